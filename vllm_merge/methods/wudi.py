# SPDX-License-Identifier: Apache-2.0
"""WUDI: least interference with the inputs that each task's own change stands for (arXiv:2503.08099).

    min over ΔW of  Σ_i ‖(ΔW − ΔW_i) ΔW_iᵀ‖² / ‖ΔW_i‖²,

which is quadratic: with S = Σ ΔW_iᵀΔW_i / ‖ΔW_i‖² and C = Σ ΔW_i ΔW_iᵀΔW_i / ‖ΔW_i‖², the least is at ΔW* = C S⁺. Gradient
descent from Σ ΔW_i with the step 1 / (2 ‖S‖₂) is, after k steps, ΔW* + (Σ ΔW_i − ΔW*)(I − S / ‖S‖₂)^k, with no loop.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from vllm_merge.algebra.bases import TOLERANCE
from vllm_merge.algebra.coordinates import owners, task_norms
from vllm_merge.algebra.cores import Cores
from vllm_merge.algebra.symmetric import descending_eigh
from vllm_merge.methods.markers import PerAdapter
from vllm_merge.methods.registry import merge_method


@merge_method("wudi", spaces=("core",), reference="arXiv:2503.08099", whole_modules=True)
def wudi(
    cores: Cores,
    statistics: None,
    *,
    weight: Annotated[Tensor, PerAdapter(1.0)],
    steps: Annotated[int, Ge(0)] | Literal["converged"] = "converged",
) -> Tensor:
    """The change nearest to every task on the inputs which that task's own rows span, in closed form. Rank ≤ Σ r_i.

    steps: gradient steps from Σ w_i ΔW_i, 0 being that sum itself; `converged` is the exact minimum.
    """
    tasks = cores.scaled(weight)
    grams_left, grams_right = tasks.own_grams()
    norms = task_norms(grams_right, grams_left, tasks.slots)
    inverse = torch.where(norms > 0, 1 / norms.square(), 0.0)
    # Of all tasks at once, as all but their own blocks is 0: LᵀL R / ‖ΔW‖², so that S = Rᵀ half.
    half = inverse[:, owners(tasks.slots).to(inverse.device, non_blocking=True), None] * grams_left @ tasks.right
    s, c = tasks.right.mT @ half, tasks.left @ (grams_right @ half)
    values, vectors = descending_eigh(s)
    support = values > TOLERANCE**2 * values[:, :1]
    least = c @ (vectors * torch.where(support, 1 / values, 0.0)[:, None, :])
    if steps != "converged":
        remaining = torch.where(support, 1 - values / values[:, :1], 0.0).clamp_min(0) ** steps
        least = least + (tasks.total() @ vectors * support[:, None, :] - least) * remaining[:, None, :]
    return least @ vectors.mT
