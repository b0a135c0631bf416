# SPDX-License-Identifier: Apache-2.0
"""DELLA: drop entries at random, the small ones more often (Deep et al., arXiv:2406.11617, MAGPRUNE), then sum or TIES.

Entries are ranked by magnitude within each row, which is one output feature of `delta` and one shared direction of `knots`.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor

from vllm_merge.algebra.masks import keep_mask, mask_identity, mask_keys
from vllm_merge.algebra.tiles import Passes, Tile
from vllm_merge.errors import UserInputError
from vllm_merge.methods.markers import PerAdapter
from vllm_merge.methods.registry import merge_method
from vllm_merge.methods.rescaling import l1_factors
from vllm_merge.methods.signs import merge_agreeing

Rescale = bool | Literal["l1"]


class DellaMasks:
    """The keys of the masks, (all modules, n) int64, and what is kept under them."""

    def __init__(self, passes: Passes, *, rescale: Rescale, **others: object) -> None:
        _check(passes)
        identities = [mask_identity(adapter) for adapter in passes.adapters]
        self._keys = mask_keys(passes.seed, identities, passes.modules).to(passes.entries.device)
        self._ranks = _RowRanks(passes)
        self._rescale = rescale
        self._factor = l1_factors(passes, lambda tile: self._masked(tile)[0]) if rescale == "l1" else None

    def kept(self, tile: Tile) -> Tensor:
        """The tile's values that are kept, rescaled, zero elsewhere; float32."""
        kept, probability = self._masked(tile)
        if self._factor is not None:
            return kept.mul_(self._factor[tile.modules][:, :, None, None])
        return kept.div_(probability) if self._rescale is True else kept

    def _masked(self, tile: Tile) -> tuple[Tensor, Tensor]:
        """The values that are kept, and the probability of each to be."""
        probability = self._probability(tile)
        kept = torch.empty_like(probability)
        for task in range(kept.shape[1]):  # one at a time: a mask needs several 64-bit numbers for each entry
            one = slice(task, task + 1)
            mask = keep_mask(self._keys[tile.modules, one], probability[:, one], tile.rows, tile.cols)
            torch.mul(tile.values[:, one], mask, out=kept[:, one])
        return kept, probability

    def _probability(self, tile: Tile) -> Tensor:
        """density − ε for the smallest entry of a row to density + ε for the largest, (modules, n, rows, cols)."""
        density, epsilon = tile.parameters["density"], tile.parameters["epsilon"]
        position = self._ranks.of(tile) / max(1, tile.right.shape[2] - 1)
        return torch.where(density < 1, density + epsilon * (2 * position - 1), 1.0)


class _RowRanks:
    """Ranks of magnitudes within rows. Where strips cut rows, those of the whole module are kept until the next one."""

    def __init__(self, passes: Passes) -> None:
        self._passes = passes
        self._held = 0
        self._module: slice | None = None
        self._ranks = torch.empty(0)

    def of(self, tile: Tile) -> Tensor:
        """0 for the smallest of a row, (modules, n, rows, cols), some integer type."""
        cols = tile.right.shape[2]
        if tile.cols == slice(0, cols):
            return _ranks(tile.values)
        if self._module != tile.modules:
            self._ranks = self._whole(tile)
            self._module = tile.modules
        return self._ranks[:, :, tile.rows, tile.cols]

    def _whole(self, tile: Tile) -> Tensor:
        """Of all rows and columns of the tile's module, made by strips of rows no larger than the tile."""
        rows, cols, n = tile.left.shape[1], tile.right.shape[2], len(tile.slots)
        kind = torch.int16 if cols <= 1 << 15 else torch.int32
        ranks = torch.empty(len(tile.values), n, rows, cols, dtype=kind, device=tile.values.device)
        self._passes.hold(max(0, ranks.nbytes - self._held))
        self._held = max(self._held, ranks.nbytes)
        lines = max(1, tile.values.numel() // (n * cols))
        for start in range(0, rows, lines):
            piece = slice(start, start + lines)
            values = [tile.left[:, piece, slot] @ tile.right[:, slot] for slot in tile.slots]
            ranks[:, :, piece] = _ranks(torch.stack(values, dim=1)).to(kind)
        return ranks


def _ranks(values: Tensor) -> Tensor:
    """Among equal ones the first column is the smaller: one sort of magnitude and column, which orders as a number does."""
    cols = values.shape[-1]
    bits = max(1, (cols - 1).bit_length())
    column = torch.arange(cols, device=values.device)
    ranks = torch.empty(values.shape, dtype=torch.int32, device=values.device)
    for own, task in zip(ranks.unbind(1), values.unbind(1), strict=True):
        order = (task.float().abs().view(torch.int32).long() << bits).bitwise_or_(column).sort(dim=-1).values
        order.bitwise_and_((1 << bits) - 1)
        own.scatter_(-1, order, column.int().expand_as(own))
    return ranks


def _check(passes: Passes) -> None:
    """Refuse probabilities that are none."""
    density, epsilon = passes.parameters["density"], passes.parameters["epsilon"]
    wrong = (density < 1) & ((density - epsilon <= 0) | (density + epsilon > 1))
    if bool(wrong.any()):
        module, index = wrong.nonzero()[0].tolist()
        raise UserInputError(
            f"merge method 'della', adapter '{passes.adapters[index].name}': entries are kept with probabilities from "
            f"density − epsilon = {float((density - epsilon)[module, index]):g} to density + epsilon = "
            f"{float((density + epsilon)[module, index]):g}; allowed is 0 < density − epsilon and density + epsilon ≤ 1. "
            "Lower epsilon"
        )


@merge_method(
    "della_linear", spaces=("knots", "delta"), reference="arXiv:2406.11617", statistics=DellaMasks, entrywise=True
)
def della_linear(
    tile: Tile,
    masks: DellaMasks,
    *,
    weight: Annotated[Tensor, PerAdapter(1.0)],
    density: Annotated[Tensor, PerAdapter(0.5), Gt(0), Le(1)],
    epsilon: Annotated[Tensor, PerAdapter(0.15), Ge(0), Lt(0.5)],
    rescale: Rescale = True,
) -> Tensor:
    """Keep entries at random, the larger in their row the more likely, rescale them, and sum.

    density: mean probability that an entry is kept; epsilon: the smallest of a row has density − epsilon, the largest
    density + epsilon, the others by their rank between. rescale: divide each by its own probability, so that the expectation
    is task arithmetic; l1: give what is kept the L1 norm that the task had at the module, as mergekit does.
    """
    return (weight * masks.kept(tile)).sum(1)


@merge_method("della", spaces=("knots", "delta"), reference="arXiv:2406.11617", statistics=DellaMasks, entrywise=True)
def della(
    tile: Tile,
    masks: DellaMasks,
    *,
    weight: Annotated[Tensor, PerAdapter(1.0)],
    density: Annotated[Tensor, PerAdapter(0.5), Gt(0), Le(1)],
    epsilon: Annotated[Tensor, PerAdapter(0.15), Ge(0), Lt(0.5)],
    rescale: Rescale = True,
    normalize: bool = True,
) -> Tensor:
    """Keep entries at random, the larger in their row the more likely, elect a sign per entry, average those that agree.

    density, epsilon, rescale: see della_linear. normalize: the mean of the tasks that agree, weighted by |w_i|; otherwise
    their weighted sum.
    """
    return merge_agreeing(masks.kept(tile) * weight, weight, normalize=normalize)
