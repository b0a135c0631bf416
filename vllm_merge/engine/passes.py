# SPDX-License-Identifier: Apache-2.0
"""What a method that needs statistics over all modules sees of a merge."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vllm_merge.adapters.factors import Adapter
from vllm_merge.algebra.cores import Cores
from vllm_merge.algebra.tiles import Part, Tile

if TYPE_CHECKING:
    from vllm_merge.engine.batches import Prepared
    from vllm_merge.engine.job import Job


class JobPasses:
    """The passes over all tiles of a job that its method's statistics ask for."""

    def __init__(self, job: Job) -> None:
        self._job = job

    @cached_property
    def parameters(self) -> Mapping[str, Tensor]:
        """Per-adapter parameters by name, each (all modules, n) float64."""
        return self._job.parameters.tensors(self._job.modules, self._job.device)

    @cached_property
    def entries(self) -> Tensor:
        """How many entries a task has at each module, (all modules,) int64."""
        return torch.cat([self._job.entries(batch) for batch in self._job.batches])

    @cached_property
    def lambdas(self) -> Tensor:
        """λ, (all modules,) float64."""
        return self._job.parameters.lambdas(self._job.modules, self._job.device)

    @property
    def adapters(self) -> Sequence[Adapter]:
        """The adapters that are merged, in order."""
        return self._job.adapters

    @property
    def modules(self) -> Sequence[str]:
        """The names of all modules, in the order of their positions."""
        return self._job.modules

    @property
    def seed(self) -> int:
        """The seed of the merge."""
        return self._job.seed

    @property
    def on_the_fly(self) -> bool:
        """Whether tiles come without their values, for the method to make."""
        return self._job.on_the_fly

    def tiles(self) -> Iterator[Tile]:
        """Start a new pass."""
        return (self._job.tile(prepared, part) for prepared, part in self._parts())

    def cores(self) -> Iterator[Cores]:
        """Start a new pass over whole modules, of any shapes at once."""
        for prepared in self._job.whole_modules():
            for part in self._job.parts(prepared):
                self._job.step("statistics", prepared.batch.start + part.modules.start)
                yield self._job.cores(prepared, part)

    def hold(self, nbytes: int) -> None:
        """Count bytes that the statistics keep until the merge ends."""
        self._job.workspace.held += nbytes

    def _parts(self) -> Iterator[tuple[Prepared, Part]]:
        job = self._job
        for batch in job.batches:
            prepared = job.prepared(batch)
            for part in job.parts(prepared):
                job.step("statistics", batch.start + part.modules.start)
                yield prepared, part
