# SPDX-License-Identifier: Apache-2.0
"""PCB-Merging: parameter competition balancing (Du et al., NeurIPS 2024, arXiv:2410.02396).

An entry counts by how large it is within its task and by whether the other tasks pull the same way:

    β_i = exp(n · |x_i|²) · tanh(x_i Σ_j x_j),   |x_i| between 0 and 1 over the whole model,

and the entries of a task that count most share out the merged value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated

import torch
from annotated_types import Gt, Le
from torch import Tensor

from vllm_merge.algebra.selection import kth_largest
from vllm_merge.algebra.tiles import Passes, Tile
from vllm_merge.methods.markers import PerAdapter
from vllm_merge.methods.registry import merge_method

OUTLIERS = 0.0001  # share of a task's magnitudes that is clamped at either end, as in the authors' code


class Competition:
    """What PCB needs to know of the whole model, each (1, n) float32."""

    def __init__(self, passes: Passes, *, density: float) -> None:
        self._passes = passes
        entries, n = int(passes.entries.sum()), len(passes.adapters)

        def from_top(ascending: int) -> Tensor:
            """The count that selects a position of d entries in ascending order."""
            return torch.full((1, n), entries - min(max(ascending, 0), entries - 1), device=passes.entries.device)

        self._least = kth_largest(self._values, from_top(int(entries * OUTLIERS)))
        self._most = kth_largest(self._values, from_top(int(entries * (1 - OUTLIERS) - 1)))
        self._range = torch.where(self._most > self._least, self._most - self._least, 1.0)
        self._threshold = self._signed_kth_largest(from_top(int(entries * (1 - density))))
        largest = torch.full((n,), -torch.inf, device=passes.entries.device)
        for tile in passes.tiles():
            largest = torch.maximum(largest, self.balance(tile).amax((0, 2, 3)))
        self._largest = largest[None]

    def _values(self) -> Iterator[tuple[Tensor, slice]]:
        for tile in self._passes.tiles():
            yield tile.values, tile.modules

    def _signed_kth_largest(self, counts: Tensor) -> Tensor:
        """The counts-th largest β of every task, where β may be negative."""

        def part(sign: float) -> Callable[[], Iterator[tuple[Tensor, slice]]]:
            return lambda: (((sign * self.balance(t)).clamp_min(0), t.modules) for t in self._passes.tiles())

        found = kth_largest(part(1.0), counts)
        if bool((found > 0).all()):
            return found
        # Either term is 0: a count beyond the positive values ends among those that are not, from the other end.
        return found - kth_largest(part(-1.0), self._passes.entries.sum() - counts + 1)

    def clamped(self, tile: Tile) -> Tensor:
        """Magnitudes without outliers, (modules, n, rows, cols) float32."""
        least, most = (bound[:, :, None, None] for bound in (self._least, self._most))
        return tile.values.float().abs().clamp(least, most)

    def balance(self, tile: Tile) -> Tensor:
        """β up to a factor common to all entries, (modules, n, rows, cols) float32."""
        values = tile.values.float()
        own = (self.clamped(tile) - self._least[:, :, None, None]) / self._range[:, :, None, None]
        return (values.shape[1] * (own.square() - 1)).exp() * (values * values.sum(1, keepdim=True)).tanh()

    def shares(self, tile: Tile) -> Tensor:
        """β cut off below the threshold, 0 there and 1 at the task's largest, (modules, n, rows, cols) float32."""
        least, most = (bound[:, :, None, None] for bound in (self._threshold, self._largest))
        balance = self.balance(tile)
        spread = most - least
        return torch.where(spread > 0, (balance - least).clamp_min(0) / spread, (balance >= most).to(balance))


@merge_method(
    "pcb", spaces=("knots", "core", "delta"), reference="arXiv:2410.02396", statistics=Competition, entrywise=True
)
def pcb(
    tile: Tile,
    competition: Competition,
    *,
    weight: Annotated[Tensor, PerAdapter(1.0)],
    density: Annotated[float, Gt(0), Le(1)] = 0.1,
) -> Tensor:
    """Let entries compete: those that are large and agreed on share out the merged value, the others get nothing.

    density: share of a task's entries, over the whole model, that takes part. weight: multiplies a task's values, not its
    share. The products x_i x_j inside tanh make the result depend on the scale of the adapters where they are near 1.
    """
    shares = competition.shares(tile)
    values = tile.values.float().sign() * competition.clamped(tile)
    total = shares.sum(1)
    return (weight * shares * values).sum(1) / torch.where(total > 0, total, 1.0)
