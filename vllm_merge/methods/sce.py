# SPDX-License-Identifier: Apache-2.0
"""SCE: select, calculate, erase (Wan et al., FuseChat, arXiv:2408.07990, §3.4).

Select the entries in which the tasks differ most, weight every task by what it has there, erase minority signs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from vllm_merge.algebra.selection import kth_largest
from vllm_merge.algebra.tiles import Passes, Tile
from vllm_merge.methods.markers import PerAdapter
from vllm_merge.methods.registry import merge_method
from vllm_merge.methods.signs import agreeing

MERGEKIT_FALLBACK = 1e-6  # mean square of all tasks together under which mergekit lets them count alike
AGREE = 1e-12  # of the mean square: a variance within it is rounding


def variance(values: Tensor) -> Tensor:
    """Over the tasks, (modules, 1, rows, cols) float32; exactly 0 where it is rounding."""
    found = (values - values.mean(1, keepdim=True)).square_().mean(1, keepdim=True)
    return torch.where(found > AGREE * values.square().mean(1, keepdim=True), found, 0.0)


class Selection:
    """The selected entries, and the share of each task in their energy, (all modules, n) float32."""

    def __init__(self, passes: Passes, *, density: float, compat: str) -> None:
        self._passes = passes
        modules = len(passes.parameters["weight"])
        self._threshold: Tensor | None = None
        if density < 1:
            differing = torch.zeros(modules, 1, dtype=torch.int64, device=passes.entries.device)
            for values, where in self._variances():
                differing[where] += values.count_nonzero((-1, -2))
            # Where the tasks agree in all entries there is nothing to choose between: all are selected.
            count = torch.where(differing > 0, (differing * density).long().clamp_min(1), passes.entries[:, None])
            self._threshold = kth_largest(self._variances, count)
        energy = torch.zeros_like(passes.parameters["weight"])
        for tile in passes.tiles():
            energy[tile.modules] += self.selected(tile).square().sum((-1, -2), dtype=torch.float64)
        if compat == "mergekit":
            faint = energy.sum(1) < MERGEKIT_FALLBACK * passes.entries
            energy = torch.where(faint[:, None], 1.0, energy)
        weighted = energy * passes.parameters["weight"]
        total = weighted.sum(1, keepdim=True)
        self.share = torch.where(total > 0, weighted / torch.where(total > 0, total, 1.0), 0.0).float()

    def _variances(self) -> Iterator[tuple[Tensor, slice]]:
        for tile in self._passes.tiles():
            yield variance(tile.values.float()), tile.modules

    def selected(self, tile: Tile) -> Tensor:
        """The tile's values, zero where they are not selected, float32."""
        values = tile.values.float()
        if self._threshold is None:
            return values
        return values * (variance(values) >= self._threshold[tile.modules][:, :, None, None])


@merge_method(
    "sce", spaces=("knots", "core", "delta"), reference="arXiv:2408.07990", statistics=Selection, entrywise=True
)
def sce(
    tile: Tile,
    selection: Selection,
    *,
    weight: Annotated[Tensor, PerAdapter(1.0), Ge(0)],
    density: Annotated[float, Gt(0), Le(1)] = 1.0,
    compat: Literal["none", "mergekit"] = "none",
) -> Tensor:
    """Select the entries in which the tasks differ most, weight each task by its energy there, erase minority signs.

    density: share of the entries in which the tasks differ at all that is selected in every module, those of the largest
    variance (select_topk of mergekit). weight: multiplies a task's share of the energy. compat: mergekit lets all tasks
    count alike at modules with a mean square under 1e-6, as small adapters have.
    """
    values = selection.selected(tile)
    share = agreeing(values) * selection.share[tile.modules][:, :, None, None]
    total = share.sum(1)
    return (share * values).sum(1) / torch.where(total > 0, total, 1.0)
