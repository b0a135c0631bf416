# SPDX-License-Identifier: Apache-2.0
"""The weighted mean of A and of B apart, as PEFT's and LoRAX's `linear`, and LoraHub's sum, have them."""

from __future__ import annotations

from typing import Annotated

from torch import Tensor

from vllm_merge.algebra.factorwise import FactorTasks
from vllm_merge.methods.factor_sides import Compat, Side, merge_sides
from vllm_merge.methods.markers import PerAdapter
from vllm_merge.methods.registry import merge_method


@merge_method("factor_linear", spaces=("factors",), reference="arXiv:2307.13269")
def factor_linear(
    tasks: FactorTasks, statistics: None, *, weight: Annotated[Tensor, PerAdapter(1.0)], compat: Compat = "none"
) -> tuple[Tensor, Tensor]:
    """Mean A times mean B, ΔW = (Σ |w_i| s_i B_i)(Σ w_i A_i) / (Σ |w_i|)². Not a mean of ΔW. Rank r, equal ranks only.

    compat: peft, PEFT's `linear`; lorax, LoRAX's `linear` and LoraHub's composition, with their bugs; both are sums.
    """
    return merge_sides(tasks, "factor_linear", compat, weight, Side.total)
