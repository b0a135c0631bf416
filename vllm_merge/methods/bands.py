# SPDX-License-Identifier: Apache-2.0
"""Keeping a band of each task's entries by magnitude, module by module: what magnitude pruning and Breadcrumbs share."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from vllm_merge.algebra.selection import kth_largest
from vllm_merge.algebra.tiles import Passes, Tile
from vllm_merge.methods.rescaling import l1_factors


class Bands:
    """Of each task's entries at each module, largest first, those from position `first` to position `last` are kept.

    entries: (all modules,) int64, how many a task has. first, last: (all modules, n) int64, from 1. With one row in all three
    they are of the whole model. rescale: give what is kept the L1 norm of all.
    """

    def __init__(self, passes: Passes, entries: Tensor, first: Tensor, last: Tensor, *, rescale: bool) -> None:
        self._passes = passes
        self._factor: Tensor | None = None
        self._least = self._threshold(last, bool((last >= entries[:, None]).all()), 0.0)
        self._most = self._threshold(first, bool((first <= 1).all()), torch.inf)
        if rescale:
            self._factor = l1_factors(passes, self.kept)

    def _threshold(self, position: Tensor, everything: bool, bound: float) -> Tensor:
        """The magnitude at a position, (all modules, n) float32; the bound where it cuts nothing off."""
        if everything:
            return torch.full((), bound, device=position.device).expand(self._passes.parameters["weight"].shape)
        return kth_largest(self._entries, position).expand(self._passes.parameters["weight"].shape)

    def _entries(self) -> Iterator[tuple[Tensor, slice]]:
        for tile in self._passes.tiles():
            yield tile.values, tile.modules

    def kept(self, tile: Tile) -> Tensor:
        """The tile's values with those outside the band set to 0, float32."""
        values = tile.values.float()
        magnitude = values.abs()
        least, most = (bound[tile.modules][:, :, None, None] for bound in (self._least, self._most))
        kept = values * ((magnitude >= least) & (magnitude <= most))
        return kept if self._factor is None else kept.mul_(self._factor[tile.modules][:, :, None, None])


def share_of(entries: Tensor, share: Tensor) -> Tensor:
    """⌊d · share⌋ of d entries, (all modules, n) int64. entries: (all modules,), share: (all modules, n) float64."""
    return (entries[:, None] * share).long()
