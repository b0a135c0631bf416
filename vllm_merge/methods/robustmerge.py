# SPDX-License-Identifier: Apache-2.0
"""RobustMerge: prune A and B apart, and rescale the rows of a rank by what pruning took (NeurIPS 2025, arXiv:2502.17159)."""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Gt, Le
from torch import Tensor

from vllm_merge.algebra.factorwise import FactorTasks
from vllm_merge.algebra.selection import kth_largest
from vllm_merge.methods.factor_sides import positive
from vllm_merge.methods.markers import PerAdapter
from vllm_merge.methods.registry import merge_method


@merge_method("robustmerge", spaces=("factors",), reference="arXiv:2502.17159")
def robustmerge(
    tasks: FactorTasks,
    statistics: None,
    *,
    weight: Annotated[Tensor, PerAdapter(1.0)],
    density: Annotated[float, Gt(0), Le(1)] = 0.2,
    clamp: Annotated[float, Gt(0), Le(1)] = 0.2,
    fuse_weight: Annotated[float, Gt(0)] = 2.0,
) -> tuple[Tensor, Tensor]:
    """Keep the largest entries of A and B, strengthen the rank-one terms that lost most, add up. Rank r, equal ranks only.

    A = f Σ w_i Â_i, B = f Σ |w_i| c_i s_i B̂_i / Σ c_i: c_ij = Σ|A_ij| / Σ|Â_ij| over row j, raised to the least of the
    largest share `clamp` of an adapter's rows. density: share of entries that is kept. fuse_weight: f.
    """
    tasks.check_equal_ranks("robustmerge")
    weight = weight.float()
    a, b = tasks.A, tasks.B * tasks.scaling
    kept_a, kept_b = (_pruned(side, tasks.ranks, density) for side in (a, b))
    present = torch.arange(a.shape[2], device=a.device) < tasks.ranks[..., None]
    lost = torch.where(present, a.abs().sum(-1) / positive(kept_a.abs().sum(-1)), torch.inf)
    index = (tasks.ranks * (1 - clamp)).long().clamp_max(a.shape[2] - 1)
    least = lost.sort(-1).values.gather(-1, index[..., None])
    coefficient = torch.where(present, torch.maximum(lost, least), 0.0)[..., None]
    share = coefficient / positive(coefficient.sum(1, keepdim=True))
    return fuse_weight * (weight * kept_a).sum(1), fuse_weight * (weight.abs() * share * kept_b).sum(1)


def _pruned(side: Tensor, ranks: Tensor, density: float) -> Tensor:
    """The entries from the ⌊(1 − density) · entries⌋-th smallest up, as the authors' code keeps them."""
    entries = ranks * side.shape[-1]
    counts = (entries - (entries.double() * (1 - density) + 1e-9).long().clamp_min(1) + 1).clamp_min(1)
    threshold = kth_largest(lambda: [(side, slice(0, len(counts)))], counts)[:, :, None, None]
    return torch.where(side.abs() >= threshold, side, 0.0)
