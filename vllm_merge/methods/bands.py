# SPDX-License-Identifier: Apache-2.0
"""Keeping a band of each task's entries by magnitude, module by module: what magnitude pruning and Breadcrumbs share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vllm_merge.algebra.selection import kth_largest_of
from vllm_merge.algebra.tiles import Passes, Tile
from vllm_merge.methods.rescaling import l1_factors
from vllm_merge.methods.signs import merge_agreeing

if TYPE_CHECKING:
    from vllm_merge.kernels.products import Rule


class Bands:
    """Of each task's entries at each module, largest first, those from position `first` to position `last` are kept.

    entries: (all modules,) int64, how many a task has. first, last: (all modules, n) int64, from 1. With one row in all three
    they are of the whole model. rescale: give what is kept the L1 norm of all.
    """

    def __init__(self, passes: Passes, entries: Tensor, first: Tensor, last: Tensor, *, rescale: bool) -> None:
        self._factor: Tensor | None = None
        below, above = bool((last < entries[:, None]).any()), bool((first > 1).any())
        cuts = [position for position, there in ((last, below), (first, above)) if there]
        found = iter(kth_largest_of(passes, torch.stack(cuts)) if cuts else ())
        zero, shape = torch.zeros((), device=entries.device), passes.parameters["weight"].shape
        self._least = (next(found) if below else zero).expand(shape)
        self._most = (next(found) if above else zero + torch.inf).expand(shape)
        if rescale:
            self._factor = l1_factors(passes, self.kept, self._rule)

    def kept(self, tile: Tile) -> Tensor:
        """The tile's values with those outside the band set to 0, float32."""
        values = tile.values.float()
        magnitude = values.abs()
        least, most = (bound[tile.modules][:, :, None, None] for bound in (self._least, self._most))
        kept = values * ((magnitude >= least) & (magnitude <= most))
        return kept if self._factor is None else kept.mul_(self._factor[tile.modules][:, :, None, None])

    def _rule(self, tile: Tile) -> Rule:
        """`kept`, for entries that are made on the fly."""
        from vllm_merge.kernels.products import Rule

        scale = None if self._factor is None else self._factor[tile.modules]
        least, most = (bound[tile.modules] for bound in (self._least, self._most))
        return Rule(tile.parameters["weight"][:, :, 0, 0], scale, least, most)

    def total(self, tile: Tile) -> Tensor:
        """The weighted sum of what is kept, (modules, rows, cols)."""
        if tile.values.is_meta:
            from vllm_merge.kernels.products import add

            return add(tile.products(), self._rule(tile))
        return (tile.parameters["weight"] * self.kept(tile)).sum(1)

    def elected(self, tile: Tile, *, normalize: bool) -> Tensor:
        """The weighted sum, or mean, of what is kept and agrees with the sign of its sum, (modules, rows, cols)."""
        weight = tile.parameters["weight"]
        if tile.values.is_meta:
            from vllm_merge.kernels.products import elect

            plus = weight.new_ones(len(weight))
            return elect(tile.products(), self._rule(tile), mean=normalize, majority=plus).merged
        return merge_agreeing(self.kept(tile) * weight, weight, normalize=normalize)


def share_of(entries: Tensor, share: Tensor) -> Tensor:
    """⌊d · share⌋ of d entries, (all modules, n) int64. entries: (all modules,), share: (all modules, n) float64."""
    return (entries[:, None] * share).long()
