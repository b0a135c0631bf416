# SPDX-License-Identifier: Apache-2.0
"""Norms of the whole tasks that a tile is a part of."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_merge.algebra.bases import gram
from vllm_merge.algebra.coordinates import task_norm
from vllm_merge.algebra.tiles import Tile


class TileNorms:
    """‖ΔW_i‖ at the modules of a tile, computed once for all strips of a module."""

    def __init__(self) -> None:
        self._modules: slice | None = None
        self._norms = torch.empty(0)

    def of(self, tile: Tile) -> Tensor:
        """(modules, n) float64."""
        if self._modules != tile.modules:
            pairs = [(tile.left[:, :, slot], tile.right[:, slot]) for slot in tile.slots]
            self._norms = torch.stack([task_norm(gram(right.mT), gram(left)) for left, right in pairs], dim=1)
            self._modules = tile.modules
        return self._norms

    def mean_magnitudes(self, tile: Tile) -> Tensor:
        """Root of the mean squared entry of the whole task, (modules, n, 1, 1) float32."""
        return (self.of(tile) / tile.entries[:, None].sqrt())[:, :, None, None].float()
