# SPDX-License-Identifier: Apache-2.0
"""RAM: average entries that tasks share, keep those of one task whole (Reinforced Agent Merging, arXiv:2601.13572).

A task has an entry where it is larger than a threshold. In the paper's setting most entries of a change are exactly 0; a LoRA's
never are, so that here the threshold is relative to the task's own size, unless it is asked to be absolute as in mergekit.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from vllm_merge.algebra.tile_norms import TileNorms
from vllm_merge.algebra.tiles import Passes, Tile
from vllm_merge.methods.markers import PerAdapter
from vllm_merge.methods.registry import merge_method

Threshold = Literal["rms", "absolute"]


class Contributions:
    """Which entries a task has."""

    def __init__(self, passes: Passes, *, epsilon: float, threshold: Threshold, **others: object) -> None:
        self._epsilon = epsilon
        self._norms = TileNorms() if threshold == "rms" else None

    def of(self, tile: Tile) -> Tensor:
        """(modules, n, rows, cols) bool."""
        values = tile.values.float()
        if self._norms is None:
            return values.abs() > self._epsilon
        return values.abs() > self._epsilon * self._norms.mean_magnitudes(tile)


@merge_method(
    "ram",
    spaces=("knots", "core", "delta"),
    reference="arXiv:2601.13572",
    statistics=Contributions,
    entrywise=True,
)
def ram(
    tile: Tile,
    contributions: Contributions,
    *,
    weight: Annotated[Tensor, PerAdapter(1.0)],
    epsilon: Annotated[float, Ge(0)] = 0.5,
    threshold: Threshold = "rms",
) -> Tensor:
    """Average the entries that several tasks have, keep whole those that one task has.

    epsilon: a task has an entry where |x| > epsilon times the root mean square of its entries at the module, or
    (threshold: absolute) where |x| > epsilon. Other entries do not count.
    """
    there = contributions.of(tile)
    return (weight * tile.values.float() * there).sum(1) / there.sum(1).clamp_min(1)


class Uniqueness(Contributions):
    """How much each task's own entries are strengthened, (all modules, n) float32."""

    def __init__(self, passes: Passes, *, boost: float, most: float, **others: float | Threshold) -> None:
        super().__init__(passes, **others)  # type: ignore[arg-type]
        shared = torch.zeros_like(passes.parameters["weight"])
        own = torch.zeros_like(shared)
        for tile in passes.tiles():
            there = self.of(tile)
            alone = there.sum(1, keepdim=True) == 1
            own[tile.modules] += (there & alone).sum((-1, -2))
            shared[tile.modules] += (there & ~alone).sum((-1, -2))
        ratio = torch.where(own > 0, shared / own.clamp_min(1), 0.0)
        self.strength = (1 + boost * ratio.clamp_max(most)).float()


@merge_method(
    "ram_plus",
    spaces=("knots", "core", "delta"),
    reference="arXiv:2601.13572",
    statistics=Uniqueness,
    entrywise=True,
)
def ram_plus(
    tile: Tile,
    uniqueness: Uniqueness,
    *,
    weight: Annotated[Tensor, PerAdapter(1.0)],
    epsilon: Annotated[float, Ge(0)] = 0.5,
    threshold: Threshold = "rms",
    boost: Annotated[float, Ge(0)] = 0.1,
    most: Annotated[float, Ge(0)] = 0.2,
) -> Tensor:
    """RAM that strengthens what one task alone has, to make up for what it loses where it shares.

    Own entries are multiplied by 1 + boost · min(ρ, most), ρ = shared entries / own entries of the task at the module (r and α
    of the paper). epsilon, threshold: see ram.
    """
    there = uniqueness.of(tile)
    count = there.sum(1, keepdim=True)
    strength = torch.where(count == 1, uniqueness.strength[tile.modules][:, :, None, None], 1.0)
    return (weight * tile.values.float() * there * strength / count.clamp_min(1)).sum(1)
