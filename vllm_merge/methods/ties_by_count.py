# SPDX-License-Identifier: Apache-2.0
"""TIES with unweighted votes and a plain count in the divisor, as PEFT's `ties_svd` has it on the dense ΔW."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from annotated_types import Gt, Le
from torch import Tensor

from vllm_merge.algebra.factorwise import scaling_of
from vllm_merge.algebra.selection import kth_largest_of
from vllm_merge.algebra.tiles import Passes, Tile
from vllm_merge.methods.factor_sides import Side
from vllm_merge.methods.factor_ties import Election, elected
from vllm_merge.methods.markers import PerAdapter
from vllm_merge.methods.registry import merge_method


class CountStatistics:
    """The smallest magnitudes that are kept, (all modules, n) float32, and factors of the weights."""

    def __init__(self, passes: Passes, *, compat: str, **parameters: object) -> None:
        counts = (passes.entries[:, None] * passes.parameters["density"]).long().clamp_min(1)
        self.threshold = kth_largest_of(passes, counts)
        self.scaling = torch.ones_like(self.threshold)
        """alpha / r where PEFT multiplies the weights with it, (all modules, n) float32."""
        if compat == "peft":
            table = [[scaling_of(adapter, module) for adapter in passes.adapters] for module in passes.modules]
            self.scaling = self.scaling.new_tensor(table)


@merge_method(
    "ties_by_count",
    spaces=("delta",),
    reference="arXiv:2306.01708",
    statistics=CountStatistics,
    entrywise=True,
    on_the_fly=True,
)
def ties_by_count(
    tile: Tile,
    statistics: CountStatistics,
    *,
    weight: Annotated[Tensor, PerAdapter(1.0)],
    density: Annotated[Tensor, PerAdapter(0.5), Gt(0), Le(1)],
    majority_sign_method: Election = "total",
    compat: Literal["none", "peft"] = "none",
) -> Tensor:
    """TIES by module in which every task has one vote: weights only scale what agrees, and its number divides.

    density: share of a task's entries at a module that is kept. majority_sign_method: elect by the sum of the entries,
    or by how many have each sign. compat: peft multiplies the weights by alpha / r, which ΔW_i contains already, as
    PEFT did in August 2026; its release 0.21.2 no longer does.
    """
    if tile.values.is_meta:
        from vllm_merge.kernels.agreement import by_count
        from vllm_merge.kernels.products import Rule

        rule = Rule(weight[:, :, 0, 0], statistics.scaling[tile.modules], statistics.threshold[tile.modules])
        return by_count(tile.products(), rule, frequency=majority_sign_method == "frequency")
    threshold, scaling = (table[tile.modules][:, :, None, None] for table in (statistics.threshold, statistics.scaling))
    values = torch.where(tile.values.abs() >= threshold, tile.values, 0.0)
    return elected(Side(values, weight * scaling, tile.entries[:, None], 0, divisor=None), majority_sign_method)
