# SPDX-License-Identifier: Apache-2.0
"""DARE (arXiv:2311.03099) on A and on B apart, then the mean or TIES, as PEFT's and LoRAX's `dare_*` have it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from annotated_types import Gt, Le
from torch import Tensor

from vllm_merge.algebra.factorwise import FactorTasks
from vllm_merge.methods.factor_sides import Compat, Side, factor_mask_keys, merge_sides
from vllm_merge.methods.factor_ties import Election, elected
from vllm_merge.methods.markers import PerAdapter
from vllm_merge.methods.registry import merge_method


def _pruned(tasks: FactorTasks, keys: Tensor, density: Tensor, compat: Compat) -> Callable[[Side], Side]:
    """DARE by module; LoRAX computes its rescaling and drops it."""
    return lambda side: side.randomly_pruned(density, keys[tasks.modules], rescale=compat != "lorax")


@merge_method("factor_dare_linear", spaces=("factors",), reference="arXiv:2311.03099", statistics=factor_mask_keys)
def factor_dare_linear(
    tasks: FactorTasks,
    keys: Tensor,
    *,
    weight: Annotated[Tensor, PerAdapter(1.0)],
    density: Annotated[Tensor, PerAdapter(0.5), Gt(0), Le(1)],
    compat: Compat = "none",
) -> tuple[Tensor, Tensor]:
    """Drop entries of A and of B at random, rescale the rest, take the means. Not a mean of ΔW. Rank r, equal ranks only.

    density: probability that an entry is kept. compat: peft, lorax: their `dare_linear`, sums; lorax does not rescale.
    """
    prune = _pruned(tasks, keys, density, compat)
    return merge_sides(tasks, "factor_dare_linear", compat, weight, lambda side: prune(side).total())


@merge_method("factor_dare_ties", spaces=("factors",), reference="arXiv:2311.03099", statistics=factor_mask_keys)
def factor_dare_ties(
    tasks: FactorTasks,
    keys: Tensor,
    *,
    weight: Annotated[Tensor, PerAdapter(1.0)],
    density: Annotated[Tensor, PerAdapter(0.5), Gt(0), Le(1)],
    majority_sign_method: Election = "total",
    compat: Compat = "none",
) -> tuple[Tensor, Tensor]:
    """Drop entries of A and of B at random, rescale the rest, elect signs, disjoint mean. Not TIES of ΔW. Rank r.

    density: probability that an entry is kept. majority_sign_method: elect by the sum of the entries, or by how many
    have each sign. compat: peft, lorax: their `dare_ties`; lorax does not rescale.
    """
    prune = _pruned(tasks, keys, density, compat)
    return merge_sides(
        tasks, "factor_dare_ties", compat, weight, lambda side: elected(prune(side), majority_sign_method)
    )
