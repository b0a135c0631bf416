# SPDX-License-Identifier: Apache-2.0
"""Task arithmetic: the weighted sum of the weight changes (Ilharco et al., ICLR 2023, arXiv:2212.04089)."""

from __future__ import annotations

from typing import Annotated

from torch import Tensor

from vllm_merge.algebra.tiles import Tile
from vllm_merge.methods.markers import PerAdapter
from vllm_merge.methods.registry import merge_method


def own_weights(*, weight: Tensor) -> Tensor:
    """c_i = w_i."""
    return weight


@merge_method(
    "task_arithmetic",
    spaces=("core", "delta", "knots"),
    reference="arXiv:2212.04089",
    version=2,
    coefficients=own_weights,
)
def task_arithmetic(tile: Tile, statistics: None, *, weight: Annotated[Tensor, PerAdapter(1.0)]) -> Tensor:
    """Weighted sum, ΔW = λ Σ w_i ΔW_i. Exact, rank ≤ Σ r_i."""
    return (weight * tile.values).sum(1)
