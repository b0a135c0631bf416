# SPDX-License-Identifier: Apache-2.0
"""Linear merging: the weighted mean of the weight changes; in space `knots` the disjoint mean of KnOTS."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from vllm_merge.algebra.tiles import Passes, Tile
from vllm_merge.errors import UserInputError
from vllm_merge.methods.markers import PerAdapter
from vllm_merge.methods.registry import merge_method


def check_weights(passes: Passes, *, normalize: bool) -> None:
    """Refuse weights that cannot be normalised."""
    if normalize:
        _check_divisor(passes.parameters["weight"].sum(1))


def _check_divisor(total: Tensor) -> None:
    if not bool(total.all()):
        raise UserInputError(
            "merge method 'linear': the weights of the adapters add up to 0, so that they cannot be normalised; "
            "change a weight or set normalize: false"
        )


def shares(*, weight: Tensor, normalize: bool) -> Tensor:
    """c_i = w_i / Σ w_j."""
    if not normalize:
        return weight
    total = weight.sum(1, keepdim=True)
    _check_divisor(total)
    return weight / total


@merge_method(
    "linear",
    spaces=("core", "delta", "knots"),
    reference="arXiv:2203.05482",
    version=2,
    statistics=check_weights,
    coefficients=shares,
)
def linear(
    tile: Tile, statistics: None, *, weight: Annotated[Tensor, PerAdapter(1.0)], normalize: bool = True
) -> Tensor:
    """Weighted mean, ΔW = Σ w_i ΔW_i / Σ w_i; without normalize the weighted sum. Exact, rank ≤ Σ r_i.

    An adapter that lacks a module counts there as zero, with its weight in the divisor. In space `knots` the mean is
    disjoint, over the non-zero entries: there such an adapter does not count.
    """
    merged = (weight * tile.values).sum(1)
    if not normalize:
        return merged
    if tile.space != "knots":
        return merged / weight.sum(1)
    divisor = (weight * (tile.values != 0)).sum(1)
    return merged / torch.where(divisor == 0, 1.0, divisor)
