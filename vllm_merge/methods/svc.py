# SPDX-License-Identifier: Apache-2.0
"""SVC: singular value calibration, against directions that several tasks add up in (arXiv:2602.05536).

With U Σ Vᵀ of a merged change M, and a_r^i = u_rᵀ ΔW_i what task i does in the r-th direction,
    s_r^i = ⟨u_rᵀ M, a_r^i⟩ / ‖a_r^i‖²,   γ_r = K / Σ_i max(α, s_r^i),   ΔW = U diag(γ ⊙ Σ) Vᵀ,
over the K tasks that do anything in that direction.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from annotated_types import Gt
from torch import Tensor

from vllm_merge.algebra.bases import TOLERANCE
from vllm_merge.algebra.cores import Cores
from vllm_merge.algebra.spectral import triples_of
from vllm_merge.methods.markers import PerAdapter
from vllm_merge.methods.registry import merge_method
from vllm_merge.methods.tsv_m import tsv_m


@merge_method("svc", spaces=("core",), reference="arXiv:2602.05536", whole_modules=True)
def svc(
    cores: Cores,
    statistics: None,
    *,
    weight: Annotated[Tensor, PerAdapter(1.0)],
    base: Literal["mean", "sum", "tsv_m"] = "mean",
    alpha: Annotated[float, Gt(0)] = 0.1,
) -> Tensor:
    """Merge, then scale each singular direction so that on average it is as strong as the tasks have it. Rank ≤ Σ r_i.

    base: what is calibrated, the mean or the sum of w_i ΔW_i, or TSV-M. alpha: the least that a task counts for in a
    direction; it bounds how much a direction can grow, at most 1 / alpha times.
    """
    tasks = cores.scaled(weight)
    if base == "tsv_m":
        merged = tsv_m(cores, None, weight=weight)
    else:
        present = (tasks.norms() > 0).sum(1).clamp_min(1) if base == "mean" else torch.ones_like(cores.ranks[:, 0])
        merged = tasks.total() / present[:, None, None]
    found = triples_of(merged)
    directions = found.U * found.S[:, None]  # u_rᵀ M = σ_r v_rᵀ
    coefficients, counted = [], []
    for index in range(len(tasks.slots)):
        left, right = tasks.task(index)
        inner = left.mT @ found.U
        along = (inner * (right @ found.V)).sum(1) * found.S
        square = (inner * ((right @ right.mT) @ inner)).sum(1)
        floor = (TOLERANCE * left.square().sum((-1, -2)).sqrt() * right.square().sum((-1, -2)).sqrt()).square()
        does = square > floor[:, None]
        coefficients.append(torch.where(does, (along / torch.where(does, square, 1.0)).clamp_min(alpha), 0.0))
        counted.append(does)
    total = torch.stack(coefficients).sum(0)
    gamma = torch.stack(counted).sum(0) / torch.where(total > 0, total, 1.0)
    return directions * gamma[:, None] @ found.V.mT
