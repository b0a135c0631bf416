# SPDX-License-Identifier: Apache-2.0
"""Merges that scale the columns of every ΔW_i, where all their terms fit into the rank: no product is formed, nothing is cut.

ΔW = Σ_i W̄_i diag(d_i), with W̄_i the ΔW_i whose columns have length 1. With B_i = Q_i R_i, Q_i orthonormal, the columns of
R_i A_i have the lengths of those of ΔW_i. So B = [Q_1 … Q_n] and A = [R_i A_i, columns at length d_i] are the factors of ΔW;
as their columns are lengths of the result, no rounding to a short dtype grows where the terms of a ΔW_i cancel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vllm_merge.adapters.arrangement import FactorViews, arranged
from vllm_merge.adapters.factors import LoraFactors
from vllm_merge.algebra.coordinates import owner_matrix, owners
from vllm_merge.algebra.symmetric import inverse_cholesky_each
from vllm_merge.engine import finish

if TYPE_CHECKING:
    from vllm_merge.engine.batches import Batch
    from vllm_merge.engine.job import Job
    from vllm_merge.methods.registry import Lengths


class ColumnSums:
    """The batches of a job that are merged so. The others are those that rounding decides, or that hold errors."""

    def __init__(self, job: Job, lengths: Lengths) -> None:
        self._job, self._lengths = job, lengths
        self._arranged = arranged(tuple(batch.group for batch in job.batches))
        self._merged: list[Batch] = []

    @classmethod
    def of(cls, job: Job) -> ColumnSums | None:
        """None for a method or parameters that make more of columns than longer ones, and for a rank that may cut."""
        lengths = None if job.spec.columns is None else job.spec.columns(**job.parameters.per_recipe)
        return None if lengths is None or job.policy.energy is not None else cls(job, lengths)

    @cached_property
    def _memory(self) -> Tensor:
        return torch.empty(self._arranged.size, dtype=self._job.dtype, device=self._job.device)

    def merge(self, batches: Sequence[Batch]) -> bool:
        """Whether these are merged: not where terms may be cut, a B_i is close to losing rank, or something is 0 or infinite."""
        good = all(self._good.get(batch.start, False) for batch in batches)
        if good:
            self._merged += batches
        return good

    @cached_property
    def _good(self) -> Mapping[int, bool]:
        """By their start, the batches that nothing is cut of, all merged, and whether they are good: the one wait for a GPU."""
        policy, found = self._job.policy, {}
        with self._job.timed("merge"):
            for index, batch in enumerate(self._job.batches):
                if policy.by_sum or (policy.limit or 0) >= batch.group.stacked_rank:
                    self._job.step("merge", batch.start)
                    found[batch.start] = self._write(batch, *self._arranged.stack(self._memory, index))
            good = torch.stack(list(found.values())).tolist() if found else []
        return dict(zip(found, good, strict=True))

    def _write(self, batch: Batch, a: Tensor, b: Tensor) -> Tensor:
        """Write the merged factors to a and b; gives whether they are good."""
        job, stack = self._job, self._job.stacked(batch)
        modules, slots = stack.group.modules, stack.group.slots
        job.workspace.count(batch.cost.total * len(modules))
        owner, membership = (part.to(job.device, non_blocking=True) for part in (owners(slots), owner_matrix(slots)))
        wide = stack.B.double()
        blocks = (wide.mT @ wide) * (owner[:, None] == owner)
        norms = blocks.diagonal(dim1=-2, dim2=-1).sqrt()
        inverse = torch.where(norms > 0, 1 / norms, 0.0)
        equilibrated = inverse[:, :, None] * blocks * inverse[:, None, :]
        lower, regular = inverse_cholesky_each(equilibrated)
        rows = ((lower @ equilibrated) * norms[:, None, :]).float() @ stack.A
        found = (membership.mT.float() @ rows.square()).sqrt_()
        parameters = {
            name: value[:, :, None].float() for name, value in job.parameters.tensors(modules, job.device).items()
        }
        wanted = self._lengths(found, **parameters)
        if not job.parameters.unscaled:
            wanted = wanted * job.parameters.lambdas(modules, job.device)[:, None, None].float()
        there = found > 0
        # Columns of Q are of length 1; those of both factors are to have the same length on average.
        total = torch.where(there, wanted, 0.0).square().sum((1, 2), dtype=torch.float64)
        root = (total / stack.group.stacked_rank).pow(0.25)[:, None, None]
        stretch = torch.where(there, wanted / (found * root.float()), 0.0)
        torch.mul(rows, stretch[:, owner], out=a)
        b.copy_(wide @ (inverse[:, :, None] * lower.mT * root))
        finite = (finish.finite(part) for part in (a, b))
        return torch.stack([*finite, (regular & (total > 0)).all()]).all()

    def factors(self) -> Mapping[str, LoraFactors]:
        """The factors of all batches that are merged, with their ranks in the report."""
        if not self._merged:
            return {}
        views = FactorViews(self._memory, self._arranged)
        report = self._job.report
        for batch in self._merged:
            report.ranks.update(dict.fromkeys(batch.group.modules, batch.group.stacked_rank))
            report.energy_kept.update(dict.fromkeys(batch.group.modules))
        if len(self._merged) == len(self._job.batches):
            return views
        return {module: views[module] for batch in self._merged for module in batch.group.modules}
