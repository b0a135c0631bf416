# SPDX-License-Identifier: Apache-2.0
"""Weighted sums whose terms all fit into the rank: the factors of the adapters, scaled, side by side. No product is formed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vllm_merge.adapters.factors import LoraFactors
from vllm_merge.adapters.stacking import ModuleGroup, side_by_side, stack_group
from vllm_merge.algebra.coordinates import Grams
from vllm_merge.errors import MergeError

if TYPE_CHECKING:
    from vllm_merge.engine.job import Batch, Job


def fits(job: Job, group: ModuleGroup) -> bool:
    """Whether the method is a weighted sum whose terms all fit into the rank, so that no smaller one is worked out."""
    if job.spec.coefficients is None or job.space != "core" or job.policy.energy is not None:
        return False
    return job.policy.by_sum or (job.policy.limit or 0) >= group.stacked_rank


def merged(job: Job, batch: Batch) -> dict[str, LoraFactors]:
    """A = [A_1; …; A_n], B = [c_1 B_1, …, c_n B_n]: exact, without a rounding but that of c_i B_i to the dtype."""
    assert job.spec.coefficients is not None
    modules, cpu = batch.group.modules, torch.device("cpu")
    job.step("merge", batch.start)
    with job.timed("factors"):
        shares = job.spec.coefficients(**job.parameters.tensors(modules, cpu), **job.parameters.per_recipe)
        shares = _like_terms(job, shares * job.parameters.lambdas(modules, cpu)[:, None])
    alike: dict[tuple[bool, ...], list[int]] = {}
    for index, pattern in enumerate((shares != 0).tolist()):
        alike.setdefault(tuple(pattern), []).append(index)
    factors: dict[str, LoraFactors] = {}
    for pattern, rows in alike.items():
        used = [index for index, there in enumerate(pattern) if there]
        factors.update(_terms(job, batch.group.of(rows), used, shares[rows][:, used]))
    return factors


def _terms(job: Job, group: ModuleGroup, used: list[int], shares: Tensor) -> dict[str, LoraFactors]:
    """Of modules that have the same terms: those of the adapters used, times their shares (modules, adapters)."""
    modules = group.modules
    if not used:
        job.report.dropped_modules += modules
        return {}
    with job.timed("factors"):
        terms, adapters = group.only(used), [job.adapters[index] for index in used]
        a, b, finite = side_by_side(terms, adapters, shares, job.device, job.dtype, job.sources)
    if not finite:
        batch = next(batch for batch in job.batches if modules[0] in batch.group.modules)
        job.check_inputs(batch, Grams.of(stack_group(batch.group, job.adapters, job.device)).norms)
        raise MergeError(f"module '{modules[0]}' or one of its shape: the merged factors do not fit {job.dtype}")
    job.report.ranks.update(dict.fromkeys(modules, terms.stacked_rank))
    job.report.energy_kept.update(dict.fromkeys(modules))
    return {m: LoraFactors(mine, its) for m, mine, its in zip(modules, a.unbind(), b.unbind(), strict=True)}


def _like_terms(job: Job, shares: Tensor) -> Tensor:
    """The shares (modules, n), those of adapters that are the same added up at the first of them."""
    first: dict[object, int] = {}
    for index, adapter in enumerate(job.adapters):
        same = first.setdefault(adapter.known_hash or id(adapter), index)
        if same != index:
            shares[:, same] += shares[:, index]
            shares[:, index] = 0
    return shares
