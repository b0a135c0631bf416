# SPDX-License-Identifier: Apache-2.0
"""How many bytes a merge holds beside its inputs and result, and how much work fits at once."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_merge.adapters.stacking import ModuleGroup
from vllm_merge.algebra.ranks import RankPolicy
from vllm_merge.algebra.tiles import BYTES_PER_ENTRY
from vllm_merge.algebra.truncation import EXACT_LIMIT, GRAM_LIMIT, OVERSAMPLING

FACTOR_COPIES = 8  # of all factors, that a method of space `factors` holds
_HELD_MATRICES = 6  # of them that stay: Gram matrices, transforms and coordinates
_SMALL_MATRICES = 16  # K × K float64 arrays alive at once when bases are made, and in methods of whole modules


@dataclass(frozen=True, slots=True)
class ModuleCost:
    """Bytes that one module of a group needs: its stack and bases, its merged entries, and its truncation.

    held: what of the first may stay between passes, the stack and what the space adds to it; bare: the latter alone.
    merged: where a method takes whole modules, with its small matrices.
    """

    stack: int
    held: int
    bare: int
    merged: int
    truncation: int

    @classmethod
    def of(cls, group: ModuleGroup, space: str, policy: RankPolicy, *, whole_modules: bool) -> ModuleCost:
        """Upper bounds, from the shapes alone."""
        (d_out, d_in), k = group.shape, group.stacked_rank
        rows = d_out if space == "delta" else min(k, d_out)
        cols = min(k, d_in) if space in ("core", "factors") else d_in
        short = min(rows, cols)
        rank = short if policy.limit is None and not policy.by_sum else min(short, policy.limit or k)
        width = min(short, rank + OVERSAMPLING)
        if width == short or short <= EXACT_LIMIT:
            spectrum = 48 * short * short  # Gram matrix, vectors, what the solver needs; float64
        elif short <= GRAM_LIMIT or 2 * width >= short:
            spectrum = 24 * short * short + 32 * width * short  # the same in float32, and the leading vectors
        else:
            spectrum = 32 * width * short
        stack = 4 * k * (d_out + d_in) + 8 * k * max(d_out, d_in) + 8 * _SMALL_MATRICES * k * k
        truncation = spectrum + 24 * rank * (d_out + d_in)
        merged = (8 if space in ("core", "factors") else 4) * rows * cols
        if space == "factors":
            merged += FACTOR_COPIES * 4 * k * (d_out + d_in)
        if whole_modules:
            merged += 8 * _SMALL_MATRICES * k * k
        bare = 8 * _HELD_MATRICES * k * k
        return cls(stack, min(bare + 4 * k * (d_out + d_in), stack), bare, merged, truncation)

    @property
    def total(self) -> int:
        """What is needed at once; what is held is a part of the stack."""
        return self.stack + self.merged + self.truncation


@dataclass(slots=True)
class Workspace:
    """The byte bound of a merge. peak: the most that was held at once, counted from the sizes of the arrays.

    held: bytes that stay, those of statistics among them. holds: whether what was worked out of the stacks stays, holds_stacks: the
    stacks, too.
    """

    limit: int
    tile_entries: int
    held: int = 0
    holds: bool = False
    holds_stacks: bool = False
    peak: int = 0

    def hold_if_fits(self, stacks: int, bare: int) -> None:
        """Set bytes aside that stay from the first pass to the last, if they leave three quarters for all else: what was
        worked out of the stacks, with them or without."""
        self.holds_stacks = stacks <= self.limit // 4
        self.holds = self.holds_stacks or bare <= self.limit // 4
        if self.holds:
            self.held = stacks if self.holds_stacks else bare

    def modules_at_once(self, cost: ModuleCost) -> int:
        """How many modules a batch may have; tiles have the other half of what is not held."""
        return max(1, (self.limit - self.held) // 2 // cost.total)

    def holds_merged(self, cost: ModuleCost) -> bool:
        """Whether a module's merged entries may be held; otherwise they are made anew at every pass over them."""
        return cost.total <= (self.limit - self.held) // 2

    def count(self, nbytes: int) -> None:
        """Note this many bytes as held at once beside what is held for later passes and one tile."""
        self.peak = max(self.peak, self.held + nbytes + BYTES_PER_ENTRY * self.tile_entries)
