# SPDX-License-Identifier: Apache-2.0
"""The artifacts of all arms are kept in memory.

An arm holds a lease for as long as its experiment runs, as a request does while it runs: what is leased is never evicted. The
slots themselves stay free to change: an arm that lost its slot is a copy away, and one slot at least is left to everybody else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from vllm_merge.recipe.experiments import Experiment
from vllm_merge.serving.control.front import Artifact, ArtifactUnavailable, FrontDoor
from vllm_merge.serving.control.names import Name, Names


class Arms:
    """Keeps the artifacts of all arms in memory, for one API process."""

    def __init__(self, front: FrontDoor) -> None:
        self._front = front
        self._held: dict[str, asyncio.Task[None]] = {}  # by digest
        self._one = asyncio.Lock()

    async def hold(self, experiments: Mapping[str, Experiment], names: Names) -> dict[str, dict[str, str]]:
        """Warm and keep every arm beside what is kept already. Returns {experiment: {arm: why}} of those that cannot be."""
        failed: dict[str, dict[str, str]] = {}
        async with self._one:
            for name, experiment in experiments.items():
                for arm, entry in experiment.arms.items():
                    known = names.names.get(entry.serve)
                    if known is None:  # the base model, or an adapter that vLLM serves by itself
                        continue
                    try:
                        await self._keep(known, names)
                    except ArtifactUnavailable as error:
                        failed.setdefault(name, {})[arm] = str(error)
        return failed

    async def release(self, experiments: Mapping[str, Experiment], names: Names) -> None:
        """Let go of everything that is no arm of these."""
        async with self._one:
            served = (
                names.names.get(arm.serve) for experiment in experiments.values() for arm in experiment.arms.values()
            )
            wanted = {known.digest for known in served if known is not None}
            unwanted = [self._held.pop(digest) for digest in list(self._held) if digest not in wanted]
            for task in unwanted:
                task.cancel()
            await asyncio.gather(*unwanted, return_exceptions=True)

    async def _keep(self, known: Name, names: Names) -> None:
        if known.digest is None:
            raise ArtifactUnavailable(known.reason, retry=False)
        if known.digest in self._held:
            return
        artifact = self._front.artifacts.setdefault(known.digest, Artifact(names.plans[known.digest]))
        leased: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._held[known.digest] = asyncio.create_task(self._lease(artifact, known.label, leased))
        try:
            await leased
        except ArtifactUnavailable:
            del self._held[known.digest]
            raise

    async def _lease(self, artifact: Artifact, label: str, leased: asyncio.Future[None]) -> None:
        """Hold a lease until this task is cancelled."""
        try:
            async with self._front.hold(artifact, label):
                leased.set_result(None)
                await asyncio.Event().wait()
        except ArtifactUnavailable as error:
            leased.set_exception(error)
