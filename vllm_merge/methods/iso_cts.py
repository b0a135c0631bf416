# SPDX-License-Identifier: Apache-2.0
"""Iso-CTS: isotropic merging in common and task-specific subspaces (Marczak et al., ICML 2025, arXiv:2502.04959, §4.2).

With R = Σ rank(ΔW_i), at most min(d_out, d_in), directions in place of the original's min(d_out, d_in): on low-rank
changes the rest would be null vectors, which are arbitrary.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import torch
from annotated_types import Ge, Le
from torch import Tensor

from vllm_merge.algebra.bases import TOLERANCE
from vllm_merge.algebra.cores import Cores
from vllm_merge.algebra.spectral import Triples, leading_of_each, polar, ranks_of_each, triples_of, triples_of_each
from vllm_merge.methods.markers import PerAdapter
from vllm_merge.methods.registry import merge_method


@merge_method("iso_cts", spaces=("core",), reference="arXiv:2502.04959", whole_modules=True)
def iso_cts(
    cores: Cores,
    statistics: None,
    *,
    weight: Annotated[Tensor, PerAdapter(1.0)],
    common_fraction: Annotated[float, Ge(0), Le(1)] = 0.8,
) -> Tensor:
    """Leading directions of the sum, then of what each task has outside them, all of one strength. Rank ≤ Σ r_i.

    ΔW = λ σ̄ polar([u_1 … u_n, U_c]) polar([v_1 … v_n, V_c])ᵀ: U_c, V_c are singular vectors of Σ w_i ΔW_i, about the
    share common_fraction of all; u_i, v_i those of (I − U_c U_cᵀ) w_i ΔW_i; σ̄ is the mean of their singular values.
    """
    tasks = cores.scaled(weight)
    alone = triples_of_each([tasks.task(index) for index in range(len(tasks.slots))])
    of_the_sum, of_each = split(ranks_of_each(alone), cores.room, common_fraction)
    most_of_the_sum, most_of_each = torch.stack([of_the_sum.amax(), of_each.amax()]).tolist()
    common = triples_of(tasks.total()).leading(of_the_sum, most_of_the_sum)
    # A Newton–Schulz step: where singular values are small, U is orthonormal to their rounding alone.
    directions = 1.5 * common.U - 0.5 * common.U @ (common.U.mT @ common.U)
    outside = replace(tasks, left=tasks.left - directions @ (directions.mT @ tasks.left))
    rests = triples_of_each(
        [outside.task(index) for index in range(len(tasks.slots))],
        [TOLERANCE * task.S[:, :1].sum(1) for task in alone],
    )
    own = leading_of_each(rests, of_each[:, None].expand(-1, len(rests)), most_of_each)
    every = Triples.cat([common, own])
    left = torch.cat([directions, polar(own.U)], -1)  # polar(every.U), as every u_i is orthogonal to U_c
    return every.mean[:, None, None] * (left @ polar(every.V).mT)


def split(ranks: Tensor, room: int, common_fraction: float) -> tuple[Tensor, Tensor]:
    """How many directions the sum has, and each task, (modules,) each. ranks: of the tasks, (modules, n)."""
    size, tasks = ranks.sum(1).clamp_max(room), (ranks > 0).sum(1).clamp_min(1)
    common = (common_fraction * size.double()).long()
    of_each = torch.round((size - common) / tasks).long()
    of_each = torch.minimum(of_each, size // tasks)
    return size - of_each * tasks, of_each
