# SPDX-License-Identifier: Apache-2.0
"""DC-Merge: even out the energies of each task's directions, merge in a basis that covers all (CVPR 2026, arXiv:2603.06242).

On LoRA a task keeps its own singular triples, as many as its rank, where the authors' code takes 16.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from vllm_merge.algebra.bases import TOLERANCE
from vllm_merge.algebra.cores import Cores
from vllm_merge.algebra.spectral import Triples, polar_of_each, triples_of_each
from vllm_merge.methods.markers import PerAdapter
from vllm_merge.methods.registry import merge_method
from vllm_merge.methods.ties import disjoint_merge

SAME = 1 - 1e-6  # entries that differ by less than rounding are kept together


@merge_method("dc_merge", spaces=("core",), reference="arXiv:2603.06242", whole_modules=True)
def dc_merge(
    cores: Cores,
    statistics: None,
    *,
    weight: Annotated[Tensor, PerAdapter(1.0)],
    smoothing: Literal["avg", "linear", "none"] = "avg",
    rho: Annotated[float, Ge(1)] = 5.0,
    keep: Annotated[float, Gt(0), Le(1)] = 0.001,
) -> Tensor:
    """Even out each task's singular values, and merge its largest entries in the basis polar([U_1 … U_n]), polar([V_1 … V_n]).

    smoothing: a task's singular values become their mean (avg), or fall evenly, the first at most rho times the last
    (linear), their sum unchanged. keep: share of a task's (Σ r_i)² entries that is kept, at least one; signs are elected
    among them, those that agree are averaged, and what couples directions of different tasks is cleared.
    """
    tasks = cores.scaled(weight)
    tasks_of = [tasks.task(index) for index in range(len(tasks.slots))]
    own = triples_of_each(tasks_of, change=lambda triples: smoothed(triples, smoothing, rho))
    every = Triples.cat(own)
    u, v = polar_of_each(every.U, every.V)
    widths = [task.S.shape[1] for task in own]
    lefts = torch.split((u.mT @ every.U) * every.S[:, None], widths, -1)
    rights = torch.split(every.V.mT @ v, widths, -2)
    entries = torch.stack([left @ right for left, right in zip(lefts, rights, strict=True)], dim=1)
    magnitudes = entries.abs()
    count = (keep * every.rank.double() ** 2).long().clamp_min(1)
    most = max(1, int(keep * every.S.shape[1] ** 2))  # no rank is larger
    descending = magnitudes.flatten(2).topk(most).values
    least = descending.gather(-1, (count - 1)[:, None, None].expand(-1, len(own), 1))
    least = torch.maximum(SAME * least, TOLERANCE * descending[..., :1])  # rounding of 0 has no sign to elect
    entries = entries * (magnitudes >= least[..., None])
    total, magnitude = entries.sum(1), entries.abs().sum(1)
    majority = total.sign().sum((-1, -2)).sign()
    merged = disjoint_merge(entries, total, magnitude, torch.ones_like(weight), True, lambda: majority)
    owner = torch.cat([torch.full((task.S.shape[1],), index) for index, task in enumerate(own)])
    return u @ (merged * (owner[:, None] == owner).to(merged)) @ v.mT


def smoothed(task: Triples, smoothing: str, rho: float) -> Triples:
    """The task with other singular values of the same sum, on its support."""
    if smoothing == "none" or not task.S.shape[1]:
        return task
    support = task.S > 0
    if smoothing == "avg":
        return Triples(task.U, task.mean[:, None] * support, task.V)
    last = task.S.gather(1, (task.rank[:, None] - 1).clamp_min(0))
    first = torch.where(last > 0, task.S[:, :1] / torch.where(last > 0, last, 1.0), 1.0).clamp_max(rho)
    position = torch.arange(task.S.shape[1], device=task.S.device) / (task.rank[:, None] - 1).clamp_min(1)
    falling = (first + (1 - first) * position) * support
    total = falling.sum(1, keepdim=True)
    return Triples(task.U, falling * (task.S.sum(1, keepdim=True) / torch.where(total > 0, total, 1.0)), task.V)
