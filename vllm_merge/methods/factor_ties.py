# SPDX-License-Identifier: Apache-2.0
"""TIES (arXiv:2306.01708) on A and on B apart, as PEFT's and LoRAX's `ties` have it."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from annotated_types import Gt, Le
from torch import Tensor

from vllm_merge.algebra.factorwise import FactorTasks
from vllm_merge.methods.factor_sides import Compat, Side, merge_sides, positive
from vllm_merge.methods.markers import PerAdapter
from vllm_merge.methods.registry import merge_method

Election = Literal["total", "frequency"]


def elected(side: Side, election: Election) -> Tensor:
    """The disjoint mean of the entries that have the elected sign, (modules, r, d); a tie elects +.

    Where the rule is a mean, weights take part in the election and in the divisor; otherwise, as in PEFT and LoRAX, the
    election comes before the weights and the divisor is how many agree.
    """
    mean = side.divisor is not None
    values = side.values * side.weight.sign() if mean else side.values
    weight = side.weight.abs() if mean else side.weight
    votes = values.sign() if election == "frequency" else values
    majority = torch.where(((weight * votes if mean else votes).sum(1, keepdim=True)) >= 0, 1.0, -1.0)
    agrees = values.sign() == majority
    return (weight * values * agrees).sum(1) / positive(((weight if mean else 1.0) * agrees).sum(1))


@merge_method("factor_ties", spaces=("factors",), reference="arXiv:2306.01708")
def factor_ties(
    tasks: FactorTasks,
    statistics: None,
    *,
    weight: Annotated[Tensor, PerAdapter(1.0)],
    density: Annotated[Tensor, PerAdapter(0.5), Gt(0), Le(1)],
    majority_sign_method: Election = "total",
    compat: Compat = "none",
) -> tuple[Tensor, Tensor]:
    """TIES on A and on B by themselves: trim by module, elect signs, disjoint mean. Not TIES of ΔW. Rank r, equal ranks only.

    majority_sign_method: elect by the sum of the entries, or by how many have each sign. compat: peft, lorax: their
    `ties`, which elect before the weights and divide by the number of entries that agree.
    """
    return merge_sides(
        tasks,
        "factor_ties",
        compat,
        weight,
        lambda side: elected(side.magnitude_pruned(density), majority_sign_method),
    )
