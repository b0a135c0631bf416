# SPDX-License-Identifier: Apache-2.0
"""largest_entry: at every entry, the value of the adapter that changes it most (as MagMax does, arXiv:2407.06322)."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge
from torch import Tensor, where

from vllm_merge.algebra.tiles import Tile
from vllm_merge.methods.markers import PerAdapter
from vllm_merge.methods.registry import merge_method


@merge_method("largest_entry", spaces=("knots", "delta", "core"), reference="arXiv:2407.06322", entrywise=True)
def largest_entry(
    tile: Tile,
    statistics: None,
    *,
    weight: Annotated[Tensor, PerAdapter(1.0)],
    floor: Annotated[float, Ge(0)] = 0.0,
) -> Tensor:
    """Take the weighted entry of largest magnitude, and zero where that is at most `floor`.

    tile.values: (modules, n, rows, cols). Returns (modules, rows, cols).
    """
    weighted = tile.values * weight.to(tile.values.dtype)
    largest = weighted.gather(1, weighted.abs().argmax(1, keepdim=True)).squeeze(1)
    return where(largest.abs() > floor, largest, 0.0)
