# SPDX-License-Identifier: Apache-2.0
"""The largest entries of A and of B apart, and their weighted mean: PEFT's `magnitude_prune`."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Gt, Le
from torch import Tensor

from vllm_merge.algebra.factorwise import FactorTasks
from vllm_merge.methods.factor_sides import merge_sides
from vllm_merge.methods.markers import PerAdapter
from vllm_merge.methods.registry import merge_method


@merge_method("factor_magnitude_prune", spaces=("factors",), reference="arXiv:2306.01708")
def factor_magnitude_prune(
    tasks: FactorTasks,
    statistics: None,
    *,
    weight: Annotated[Tensor, PerAdapter(1.0)],
    density: Annotated[Tensor, PerAdapter(0.5), Gt(0), Le(1)],
    compat: Literal["none", "peft"] = "none",
) -> tuple[Tensor, Tensor]:
    """Keep the largest entries of A and of B by module, and take their means. Not a mean of ΔW. Rank r, equal ranks only.

    density: share of the entries of A, and of those of B, that is kept. compat: peft, PEFT's `magnitude_prune`, a sum.
    """
    return merge_sides(
        tasks, "factor_magnitude_prune", compat, weight, lambda side: side.magnitude_pruned(density).total()
    )
