# SPDX-License-Identifier: Apache-2.0
"""The thread that brings artifacts back from the tiers below a worker's cache."""

from __future__ import annotations

import contextlib
import functools
import logging
import queue
from collections.abc import Callable

import torch

from vllm_merge.recipe.plan import Plan
from vllm_merge.serving.memory.arena import Arena
from vllm_merge.serving.memory.residency import ArtifactStore, OutOfBudget, ResidentArtifact
from vllm_merge.serving.memory.tiers import Tiers
from vllm_merge.serving.worker.jobs import Job
from vllm_merge.serving.worker.placing import Placing
from vllm_merge.serving.worker.sleep import Wakefulness

logger = logging.getLogger("vllm_merge.worker")


class Returning:
    """cold: the jobs to look for. Called in the thread: ended(job, result or error), merge(job) for what no tier has, and
    remember(artifact) for one that left the cache before it was hashed.
    """

    def __init__(
        self,
        cold: queue.SimpleQueue[Job],
        *,
        tiers: Tiers,
        store: ArtifactStore,
        arena: Arena,
        placing: Placing,
        wakefulness: Wakefulness,
        prepare_thread: Callable[[], None],
        ended: Callable[[Job, ResidentArtifact | Exception], None],
        merge: Callable[[Job], None],
        remember: Callable[[ResidentArtifact], None],
    ) -> None:
        self._cold, self._tiers, self._store, self._arena = cold, tiers, store, arena
        self._placing, self._wakefulness = placing, wakefulness
        self._prepare_thread, self._ended, self._merge = prepare_thread, ended, merge
        self._remember = remember

    def run_forever(self) -> None:
        self._prepare_thread()
        while True:
            job = self._cold.get()
            try:
                result: ResidentArtifact | Exception | None = self._wakefulness.awake(
                    functools.partial(self._returned, job.plan)
                )
            except OutOfBudget as error:
                result = error
            except Exception:
                logger.exception("%s could not come back from the tiers and is merged anew", job.plan.artifact_name)
                result = None
            if result is None:
                self._merge(job)
            else:
                self._ended(job, result)
                if isinstance(result, ResidentArtifact) and result.tensors_sha256 is None:
                    self._remember(result)
            del job, result

    def _returned(self, plan: Plan) -> ResidentArtifact | None:
        """The artifact from the nearest tier, None if none has it."""
        with self._tiers.fetch(plan.digest) as found, contextlib.ExitStack() as admitted:
            if found is None:
                return None
            tier, content = found
            with torch.inference_mode(), self._arena.use():
                admitted.enter_context(self._store.admission)
                pairs, embeddings = content.factors(), content.embeddings
                artifact = self._placing.place(plan, pairs, content.tensors_sha256, content.seconds, tier, embeddings)
                artifact.report = content.report
            self._store.insert(artifact)
        logger.info("%s came back: %s, %.1f MB", artifact.name, tier, artifact.nbytes / 1e6)
        return artifact
