# SPDX-License-Identifier: Apache-2.0
"""Rescaling of what a sparse rule keeps, so that each task keeps its L1 norm at each module, as mergekit does."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vllm_merge.algebra.tiles import Passes, Tile

if TYPE_CHECKING:
    from vllm_merge.kernels.products import Rule


def l1_factors(passes: Passes, kept: Callable[[Tile], Tensor], rule: Callable[[Tile], Rule] | None = None) -> Tensor:
    """Σ |x| / Σ |kept x| of every task at every module, (all modules, n) float32; 1 where nothing is kept.

    kept: a tile's values, zero where they are dropped. rule: the same for a tile whose values are made on the fly.
    """
    before = torch.zeros_like(passes.parameters["weight"])
    after = torch.zeros_like(before)
    for tile in passes.tiles():
        if rule is not None and tile.values.is_meta:
            from vllm_merge.kernels.products import magnitudes

            found = magnitudes(tile.products(), rule(tile))
            before[tile.modules] += found[..., 0]
            after[tile.modules] += found[..., 1]
            continue
        before[tile.modules] += tile.values.abs().sum((-1, -2), dtype=torch.float64)
        after[tile.modules] += kept(tile).abs().sum((-1, -2), dtype=torch.float64)
    return torch.where(after > 0, before / torch.where(after > 0, after, 1.0), 1.0).float()
