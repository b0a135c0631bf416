# SPDX-License-Identifier: Apache-2.0
"""Weighted sums whose terms all fit into the rank: the factors of the adapters, scaled, side by side. No product is formed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vllm_merge.adapters.arrangement import FactorViews, arranged
from vllm_merge.adapters.factors import LoraFactors
from vllm_merge.adapters.stacking import ModuleGroup, side_by_side, stack_group
from vllm_merge.algebra.coordinates import Grams
from vllm_merge.errors import MergeError

if TYPE_CHECKING:
    from vllm_merge.engine.batches import Batch
    from vllm_merge.engine.job import Job
    from vllm_merge.methods.registry import Coefficients
    from vllm_merge.methods.resolve import Scalars


def fits(job: Job, group: ModuleGroup) -> bool:
    """Whether the method is a weighted sum whose terms all fit into the rank, so that no smaller one is worked out."""
    if job.spec.coefficients is None or job.space != "core" or job.policy.energy is not None:
        return False
    return job.policy.by_sum or (job.policy.limit or 0) >= group.stacked_rank


def merged(job: Job, batches: Sequence[Batch]) -> Mapping[str, LoraFactors]:
    """A = [A_1; …; A_n], B = [c_1 B_1, …, c_n B_n]: exact, without a rounding but that of c_i B_i to the dtype."""
    for batch in batches:
        job.step("merge", batch.start)
    with job.timed("factors"):
        groups = [batch.group for batch in batches]
        found = [_terms(job, batches, *terms) for terms in _alike(groups, _like_terms(job, _shares(job, groups)))]
    if len(found) == 1:
        return found[0]
    return {module: factors for some in found for module, factors in some.items()}


def _shares(job: Job, groups: Sequence[ModuleGroup]) -> Tensor:
    """c_i · λ at every module, (modules, n) float64, on the CPU; (1, n) where those of all modules are alike."""
    coefficients, parameters = job.spec.coefficients, job.parameters
    assert coefficients is not None
    if (scalars := parameters.scalars) is not None:
        return _shares_of(coefficients, scalars)
    modules, cpu = [module for group in groups for module in group.modules], torch.device("cpu")
    shares = coefficients(**parameters.tensors(modules, cpu), **parameters.per_recipe)
    return shares * parameters.lambdas(modules, cpu)[:, None]


@lru_cache(maxsize=16)  # of the merges that are made again and again
def _shares_of(coefficients: Coefficients, scalars: Scalars) -> Tensor:
    own, recipe, lam = scalars
    tables = {name: torch.tensor([values], dtype=torch.float64) for name, values in own}
    return coefficients(**tables, **dict(recipe)) * lam


def _alike(groups: Sequence[ModuleGroup], shares: Tensor) -> Iterator[tuple[list[int], list[ModuleGroup], Tensor]]:
    """The adapters that have a share, with the modules that have these terms alone, and their shares (modules, adapters).

    shares: (modules, adapters), or (1, adapters) where those of all modules are alike, and then so are those given.
    """
    if len(shares) == 1 or shares.numpy().all():
        used = [index for index, share in enumerate(shares.tolist()[0]) if share]
        yield used, list(groups), shares if len(used) == shares.shape[1] else shares[:, used]
        return
    patterns = (shares != 0).tolist()
    for pattern in dict.fromkeys(map(tuple, patterns)):
        rows = [index for index, mine in enumerate(patterns) if tuple(mine) == pattern]
        used = [index for index, has in enumerate(pattern) if has]
        picked, start = [], 0
        for group in groups:
            end = start + len(group.modules)
            if mine := [row - start for row in rows if start <= row < end]:
                picked.append(group.of(mine))
            start = end
        yield used, picked, shares[rows][:, used]


def _terms(
    job: Job, batches: Sequence[Batch], used: Sequence[int], groups: Sequence[ModuleGroup], shares: Tensor
) -> Mapping[str, LoraFactors]:
    """Of modules that have the same terms: those of the adapters used, times their shares, (modules, adapters) or one row."""
    terms = [group.only(used) for group in groups]
    if nothing := [module for group in terms if not group.stacked_rank for module in group.modules]:
        job.report.dropped_modules += nothing
        if len(shares) > 1:
            shares = shares[torch.tensor([group.stacked_rank > 0 for group in terms for _ in group.modules])]
        terms = [group for group in terms if group.stacked_rank]
    if not terms:
        return {}
    arrangement = arranged(tuple(terms))
    memory = torch.empty(arrangement.size, dtype=job.dtype, device=job.device)
    overflow = side_by_side(arrangement, memory, [job.adapters[index] for index in used], shares, job.sources)
    factors = FactorViews(memory, arrangement)
    for group in terms:
        job.report.ranks.update(dict.fromkeys(group.modules, group.stacked_rank))
        job.report.energy_kept.update(dict.fromkeys(group.modules))
    job.unsettled.append((overflow, batches, factors))
    return factors


def explain(job: Job, batches: Sequence[Batch], factors: Mapping[str, LoraFactors]) -> None:
    """Raise MergeError for factors that are not finite: an adapter's own, or merged ones that their dtype cannot hold."""
    for batch in batches:
        stack = stack_group(batch.group, job.adapters, job.device)
        job.check_inputs(batch.group.modules, Grams.of(stack, job.workspace.scratch_modules(batch.cost.gram)).norms)
    module = next(m for m, pair in factors.items() if not (pair.A.isfinite().all() and pair.B.isfinite().all()))
    raise MergeError(f"module '{module}': the merged factors do not fit {job.dtype}; choose a wider dtype")


def _like_terms(job: Job, shares: Tensor) -> Tensor:
    """The shares (modules, n), those of adapters that are the same added up at the first of them."""
    if len({adapter.known_hash or id(adapter) for adapter in job.adapters}) == len(job.adapters):
        return shares
    shares, first = shares.clone(), dict[object, int]()
    for index, adapter in enumerate(job.adapters):
        same = first.setdefault(adapter.known_hash or id(adapter), index)
        if same != index:
            shares[:, same] += shares[:, index]
            shares[:, index] = 0
    return shares
