# SPDX-License-Identifier: Apache-2.0
"""How many bytes a merge holds beside its inputs and result, and how much work fits at once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from vllm_merge.adapters.stacking import ModuleGroup
from vllm_merge.algebra.ranks import RankPolicy
from vllm_merge.algebra.tiles import BYTES_PER_ENTRY
from vllm_merge.algebra.truncation import EXACT_LIMIT, GRAM_LIMIT, OVERSAMPLING

FACTOR_COPIES = 8  # of all factors, that a method of space `factors` holds
_HELD_MATRICES = 6  # K × K float64 arrays that stay: Gram matrices, transforms and coordinates
_GRAMS = 4  # of them where there are no bases: Gram matrices and their products
_SMALL_MATRICES = 16  # of them that are alive at once when bases are made, and in methods of whole modules
_SCRATCH = 8  # of the limit, one part for what is widened to float64, some modules at a time
_STATISTICS = 4  # and one for statistics, where a method's hold more than a number for a task


@dataclass(frozen=True, slots=True)
class ModuleCost:
    """Bytes that one module of a group needs.

    stack: its factors. small: the K × K arrays its bases are made with. merged: its merged entries. method: what a method
    makes these with. truncation: what they are cut with. gram, lifted: what factors are widened to, for Gram matrices and
    to become those of the result, of as many modules at a time as there is scratch for. bare: what the space keeps of the
    module between passes, beside the stack.
    """

    stack: int
    small: int
    merged: int
    method: int
    truncation: int
    gram: int
    lifted: int
    bare: int

    @classmethod
    @lru_cache(maxsize=64)  # of the merges that are made again and again
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
        # Singular vectors of the long side, and twice in float32 where they come in strips.
        truncation = spectrum + 12 * width * max(rows, cols)
        based = space in ("core", "knots")  # others have no bases, or those of one task that the method makes
        method = 8 * _SMALL_MATRICES * k * k if whole_modules else 0
        if space == "factors":
            method += FACTOR_COPIES * 4 * k * (d_out + d_in) + 8 * _SMALL_MATRICES * k * k
        return cls(
            stack=4 * k * (d_out + d_in),
            small=8 * k * k * (_SMALL_MATRICES if based else _GRAMS),
            merged=(8 if space in ("core", "factors") else 4) * rows * cols,
            method=method,
            truncation=truncation,
            gram=8 * k * max(d_out, d_in),
            lifted=8 * rank * (d_out + d_in) + 8 * max(k, rank) * max(d_out, d_in),
            bare=8 * k * k * (_HELD_MATRICES if based else _GRAMS),
        )

    @property
    def held(self) -> int:
        """What may stay between passes, the stack among it."""
        return self.bare + self.stack

    @property
    def scratch(self) -> int:
        """The least that scratch must have."""
        return max(self.gram, self.lifted)

    @property
    def result(self) -> int:
        """What stays of a merge until it is cut."""
        return self.merged + self.truncation

    @property
    def total(self) -> int:
        """What is needed at once beside scratch: bases are made before entries are merged, these before they are cut."""
        return self.stack + max(self.small, self.merged + max(self.method, self.truncation))


@dataclass(slots=True)
class Workspace:
    """The byte bound of a merge. peak: the most that was held at once, counted from the sizes of the arrays.

    aside: bytes for statistics. held: bytes that stay, those of statistics among them. holds: whether what was worked out
    of the stacks stays, holds_stacks: the stacks, too.
    """

    limit: int
    tile_entries: int
    aside: int = 0
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

    def set_aside(self) -> None:
        """Leave room for statistics that are not there yet."""
        self.aside = self.limit // _STATISTICS

    def scratch_modules(self, scratch: int) -> int:
        """How many modules may have their scratch at a time."""
        return max(1, self.limit // _SCRATCH // scratch)

    def room(self, scratch: int) -> int:
        """Bytes for what is neither held, nor a tile, nor scratch."""
        tile = BYTES_PER_ENTRY * self.tile_entries
        return self.limit - self.held - self.aside - tile - max(self.limit // _SCRATCH, scratch)

    def modules_at_once(self, cost: ModuleCost) -> int:
        """How many modules a batch may have."""
        return max(1, self.room(cost.scratch) // cost.total)

    def holds_merged(self, cost: ModuleCost) -> bool:
        """Whether a module's merged entries may be held; otherwise they are made anew at every pass over them."""
        return cost.total <= self.room(cost.scratch)

    def count(self, nbytes: int, scratch: int = 0) -> None:
        """Note this many bytes as held at once beside what is held for later passes, one tile, and scratch, of a module."""
        some = self.scratch_modules(scratch) * scratch if scratch else 0
        self.peak = max(self.peak, self.held + nbytes + some + BYTES_PER_ENTRY * self.tile_entries)
