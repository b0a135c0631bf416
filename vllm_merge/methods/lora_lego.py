# SPDX-License-Identifier: Apache-2.0
"""LoRA-LEGO: the rank-one terms of all adapters, clustered, one term of each cluster (arXiv:2409.16167).

A unit is a row of A beside its column of B. k-means runs on the units' Gram matrix: distances to centroids are means of it.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from annotated_types import Ge
from torch import Tensor
from torch.nn.functional import one_hot

from vllm_merge.algebra.factorwise import FactorTasks
from vllm_merge.methods.factor_sides import positive
from vllm_merge.methods.markers import PerAdapter
from vllm_merge.methods.registry import merge_method

MAX_ITERATIONS = 100


@merge_method("lora_lego", spaces=("factors",), reference="arXiv:2409.16167", iterative=True)
def lora_lego(
    tasks: FactorTasks,
    statistics: None,
    *,
    weight: Annotated[Tensor, PerAdapter(1.0)],
    target_rank: Annotated[int, Ge(1)] | Literal["largest"] = "largest",
) -> tuple[Tensor, Tensor]:
    """Cluster the rank-one terms [a_j; b_j] of all adapters, and keep the mean of each cluster. Ranks may differ. Rank k.

    target_rank: k, the number of clusters; the largest of the adapters' ranks unless given. Means have the mean size
    (largest entry) of their members, and the result is multiplied by √(Σ r_i / k).
    """
    units = torch.cat([tasks.A, tasks.B * tasks.scaling * weight.float()], dim=-1).flatten(1, 2)
    slots = torch.arange(tasks.A.shape[2], device=units.device)
    present = (slots < tasks.ranks[..., None]).flatten(1)
    number = tasks.ranks.sum(1)
    wanted = tasks.ranks.amax(1) if target_rank == "largest" else torch.full_like(number, target_rank)
    clusters = torch.minimum(wanted, number)
    wide = units.double()
    members = clustered(wide @ wide.mT, present, clusters)
    counts = members.sum(1)[..., None]
    means = (members.mT @ wide) / positive(counts)
    sizes = members.mT @ wide.abs().amax(-1, keepdim=True) / positive(counts)
    means = means * sizes / positive(means.abs().amax(-1, keepdim=True))
    a, b = means[..., : tasks.A.shape[-1]], means[..., tasks.A.shape[-1] :]
    return a.float(), ((number / clusters).sqrt()[:, None, None] * b).float()


def clustered(gram: Tensor, present: Tensor, clusters: Tensor) -> Tensor:
    """k-means of units given by their Gram matrix (modules, N, N): who is in which cluster, (modules, N, max k) float64.

    present: (modules, N) bool; clusters: (modules,), k. Starts from the longest unit, then each time the one farthest from
    those that were chosen: no randomness.
    """
    squares = gram.diagonal(dim1=-2, dim2=-1)
    distances = (squares[:, :, None] + squares[:, None] - 2 * gram).clamp_min(0)
    nearest = torch.where(present, squares, -1.0)
    to_centres = []
    for index in range(int(clusters.max())):
        chosen = nearest.argmax(1)
        found = distances.gather(2, chosen[:, None, None].expand(-1, distances.shape[1], 1))[..., 0]
        nearest = torch.where(present, found if index == 0 else torch.minimum(nearest, found), -1.0)
        to_centres.append(torch.where((index < clusters)[:, None], found, torch.inf))
    members = _nearest(torch.stack(to_centres, dim=-1), present)
    for _ in range(MAX_ITERATIONS):
        counts = members.sum(1, keepdim=True)
        share = members / positive(counts)
        inner = gram @ share
        centre = (share * inner).sum(1, keepdim=True)
        now = _nearest(torch.where(counts > 0, squares[..., None] - 2 * inner + centre, torch.inf), present)
        if torch.equal(now, members):
            break
        members = now
    return members


def _nearest(distances: Tensor, present: Tensor) -> Tensor:
    """Each unit's nearest cluster as (modules, N, k) zeros and ones, float64."""
    return one_hot(distances.argmin(-1), distances.shape[-1]).double() * present[..., None]
