# SPDX-License-Identifier: Apache-2.0
"""From the merged coordinates of a batch, cut to their rank, to the factors of its modules."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vllm_merge.adapters.factors import LoraFactors
from vllm_merge.adapters.stacking import Stack
from vllm_merge.algebra.truncation import Truncated
from vllm_merge.errors import MergeError

if TYPE_CHECKING:
    from vllm_merge.engine.job import Job, Prepared

CANCELLED = 1e-7  # of the largest weighted task; float32 rounding


def factors(job: Job, prepared: Prepared, cut: Truncated, described: Truncated, tall: bool) -> dict[str, LoraFactors]:
    """The merged factors. described: the same by singular vectors, for the report."""
    modules = prepared.batch.group.modules
    stack = job.stack(prepared)
    left, right = _lifted(prepared, stack, cut, tall)
    if job.overview is not None:
        with job.timed("report"):
            seen = (left, right) if described is cut else _lifted(prepared, stack, described, tall)
            job.overview.add(stack, prepared.grams, *seen)
    # Singular vectors are unique up to sign: the largest entry of each column of B is made positive.
    if cut.singular:
        sign = torch.where(left.gather(1, left.abs().argmax(1, keepdim=True)) < 0, -1.0, 1.0)
        left, right = left * sign, right * sign
    b, a = (torch.empty(part.shape, dtype=job.dtype, device=part.device).copy_(part) for part in (left, right.mT))
    fits = b.isfinite().all(-1).all(-1) & a.isfinite().all(-1).all(-1)
    facts = torch.stack([cut.ranks, cut.norm, cut.energy, cut.exact, _noise(prepared), fits], 1).tolist()  # in one go
    shortened = any(ranks < cut.long.shape[2] for ranks, *_ in facts)
    found = {}
    for index, (module, (ranks, norm, energy, exact, noise, fit)) in enumerate(zip(modules, facts, strict=True)):
        if not fit:
            raise MergeError(f"module '{module}': the merged factors do not fit {job.dtype}; choose a wider dtype")
        rank = int(ranks)
        if rank == 0 or norm <= noise:
            job.report.dropped_modules.append(module)
            continue
        job.report.ranks[module] = rank
        job.report.norms[module] = norm
        job.report.energy_kept[module] = None if exact else energy
        mine, its = a[index, :rank], b[index, :, :rank]
        if shortened:  # copies of all: no module must keep the memory of what was cut off, of itself or of others
            mine, its = _own(mine), _own(its)
        found[module] = LoraFactors(mine, its)
    return found


def _lifted(prepared: Prepared, stack: Stack, cut: Truncated, tall: bool) -> tuple[Tensor, Tensor]:
    """The factors of the weight change from those of the merged coordinates: (modules, d_out, k), (modules, d_in, k)."""
    space, of = prepared.coordinates, prepared.product or stack
    left, right = (cut.long, cut.short) if tall else (cut.short, cut.long)
    if space.left_transform is not None:
        left = of.B.double() @ (space.left_transform @ left.double())
    if space.right_transform is not None:
        right = of.A.mT.double() @ (space.right_transform @ right.double())
    return left, right


def _noise(prepared: Prepared) -> Tensor:
    """Norm under which a result is what rounding leaves of tasks that cancel, (modules,) float64."""
    scale = prepared.grams.norms * prepared.lam.abs()[:, None]
    if "weight" in prepared.parameters:
        scale = scale * prepared.parameters["weight"].abs()
    return scale.amax(1) * CANCELLED


def _own(view: Tensor) -> Tensor:
    return view.clone(memory_format=torch.contiguous_format)
