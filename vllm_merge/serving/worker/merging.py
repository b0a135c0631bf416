# SPDX-License-Identifier: Apache-2.0
"""The thread that merges, on the worker's own device, one merge at a time, and what follows a merge once it is served."""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import time
import weakref
from collections.abc import Callable

import torch

from vllm_merge.artifact import MergedAdapter
from vllm_merge.errors import MergeCancelled, MergeError
from vllm_merge.plan_runner import run_plan
from vllm_merge.recipe.plan import Plan
from vllm_merge.serving.memory.arena import Arena
from vllm_merge.serving.memory.hasher import Hasher
from vllm_merge.serving.memory.place import Place
from vllm_merge.serving.memory.residency import ArtifactStore, ResidentArtifact
from vllm_merge.serving.memory.sources import SourceCache
from vllm_merge.serving.memory.tiers import Tiers
from vllm_merge.serving.telemetry.metrics_tally import Tally
from vllm_merge.serving.telemetry.timeline import Timeline
from vllm_merge.serving.worker.jobs import Job, Line, too_long
from vllm_merge.serving.worker.news import News
from vllm_merge.serving.worker.pace import Pace
from vllm_merge.serving.worker.placing import Placing
from vllm_merge.serving.worker.sleep import Wakefulness

logger = logging.getLogger("vllm_merge.worker")

# How long after a merge on a GPU what can wait begins. Whoever waited for the merge has the prompt read first: such a step calls
# the device hundreds of times, and each call would compete with us for the interpreter.
SETTLE_SECONDS = 0.3


class Merging:
    """`begun`, `ended` and `look` are called in the merging thread: when a merge begins, with its result or error, and for a job
    that another replica has merged meanwhile. merges: how many were made.
    """

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        workspace_bytes: int,
        time_limit: float,
        *,
        store: ArtifactStore,
        arena: Arena,
        sources: SourceCache,
        tiers: Tiers,
        line: Line,
        placing: Placing,
        wakefulness: Wakefulness,
        news: News,
        tally: Tally,
        pace: Pace,
        prepare_thread: Callable[[], None],
        begun: Callable[[Job], None],
        ended: Callable[[Job, ResidentArtifact | Exception], None],
        look: Callable[[Job], None],
    ) -> None:
        self._device, self._dtype, self._workspace, self._time_limit = device, dtype, workspace_bytes, time_limit
        self._store, self._arena, self._sources, self._tiers, self._line = store, arena, sources, tiers, line
        self._placing, self._wakefulness = placing, wakefulness
        self._news, self._tally, self._pace = news, tally, pace
        self._prepare_thread, self._begun, self._ended, self._look = prepare_thread, begun, ended, look
        self._hasher = Hasher(device)
        self._settle = SETTLE_SECONDS if device.type == "cuda" else 0.0
        self.after = Place("vllm-merge-after")
        """What follows a merge, in a thread that does not keep the process from ending: it waits while vLLM sleeps."""
        self.after.submit(prepare_thread)
        self._unhashed: list[tuple[float, str, weakref.ref[ResidentArtifact]]] = []  # begin, digest, artifact
        self.merges = 0

    def run_forever(self) -> None:
        self._prepare_thread()
        while True:
            job = self._line.get()
            digest = job.plan.digest
            if job.plan.kind == "recipe" and not self._tiers.merge_here(digest):
                self._line.ended(None)
                job.status = "elsewhere"
                self._tiers.await_other(digest, functools.partial(self._look, job))
                continue
            started = time.monotonic()
            job.deadline = started + self._time_limit
            self._news.started(job)
            result: ResidentArtifact | Exception
            try:
                self._begun(job)
                result = self._made(job)
            except Exception as error:
                result = too_long(job, self._time_limit) if isinstance(error, MergeCancelled) and job.late else error
            merged = isinstance(result, ResidentArtifact)
            self._line.ended(time.monotonic() - started if merged else None)
            self._ended(job, result)
            if isinstance(result, ResidentArtifact):
                self.remember(result)
            else:
                self._tiers.release(digest)
            del job, result  # while it waits, this thread keeps no artifact alive

    def _made(self, job: Job) -> ResidentArtifact:
        merge = functools.partial(self._merge, job)
        try:
            return self._wakefulness.awake(merge)
        except torch.OutOfMemoryError:
            logger.warning(
                "merging %s: out of memory; memory that is kept unused is given back, and it is merged anew",
                job.plan.artifact_name,
            )
        # Behind the handler: the error keeps the frames of the merge, and they its tensors.
        gc.collect()
        self._arena.give_back()
        return self._wakefulness.awake(merge)

    def remember(self, artifact: ResidentArtifact) -> None:
        """Hash an artifact, and see to it that the disk has it, in the thread `after`: the latest artifact first. The oldest is
        the next to be evicted, and whoever needs its room would wait for the hash.
        """
        self._unhashed.append((time.monotonic() + self._settle, artifact.digest, weakref.ref(artifact)))
        self.after.submit(self._remember_latest)

    def _remember_latest(self) -> None:
        """What can wait until an artifact is served and whoever waited has the prompt read: its hash, and its way to the disk. One
        that is gone needs neither.
        """
        begin, digest, reference = self._unhashed.pop()
        time.sleep(max(0.0, begin - time.monotonic()))

        def remember() -> None:
            artifact = reference()
            if artifact is None:
                self._tiers.release(digest)
                return
            if artifact.tensors_sha256 is None:
                timeline = Timeline()
                with timeline.step("hash"):
                    artifact.tensors_sha256 = self._hasher.tensors_sha256(artifact)
                self._tally.stages(timeline.stages())
            self._tiers.store(artifact)

        try:
            self._wakefulness.awake(remember)
        except Exception:
            self._tiers.release(digest)
            logger.exception("an artifact is served, but could not be hashed or kept")

    def _merge(self, job: Job) -> ResidentArtifact:
        if job.cancelled.is_set():
            raise MergeCancelled(f"{job.plan.artifact_name}: nobody waits for it any more")
        started, timeline = time.perf_counter(), Timeline()
        timeline.add("queue", job.queued, time.time() - job.queued)

        def progress(stage: str, done: int, total: int) -> None:
            job.done, job.total = done, total
            self._news.progress(job)

        def stopped() -> bool:
            self._arena.rest()
            return job.stopped() or self._wakefulness.asleep

        def going_on() -> None:
            if stopped():
                raise MergeCancelled(f"{job.plan.artifact_name}: nobody waits for it any more")

        with contextlib.ExitStack() as admitted:
            with torch.inference_mode(), self._arena.use():
                admitted.callback(self._sources.done)
                with timeline.step("read"):
                    self._sources.fetch(job.plan, going_on)
                began, merging = time.time(), time.perf_counter()
                merged = run_plan(
                    job.plan,
                    device=self._device,
                    dtype=self._dtype,
                    load_adapter=self._sources.load,
                    progress=progress,
                    cancelled=stopped,
                    workspace_bytes=self._workspace,
                    report="brief",
                )
                timeline.add("merge", began, time.perf_counter() - merging, merged.report.seconds)
                with timeline.step("place"):
                    admitted.enter_context(self._store.admission)
                    artifact = self._resident(job.plan, merged, time.perf_counter() - started)
            artifact.steps = timeline.steps
            if job.plan.stages:
                artifact.report = merged.report.to_dict()
                parameters = sum(a.numel() + b.numel() for a, b in artifact.factors.values())
                self._pace.learn(job.plan, artifact.seconds, parameters)
            self._tally.stages(timeline.stages())
            self._store.insert(artifact)
        self.merges += 1
        logger.info(
            "merged %s: rank %d, %.1f MB, %.3f s", artifact.name, artifact.rank, artifact.nbytes / 1e6, artifact.seconds
        )
        return artifact

    def _resident(self, plan: Plan, merged: MergedAdapter, seconds: float) -> ResidentArtifact:
        pairs = {module: (f.A, f.B) for module, f in merged.factors.items()}
        if not pairs:
            raise MergeError(f"{plan.artifact_name} changes no weight: its adapters are zero, or cancel each other")
        # On a GPU this would take longer than the merge: it follows when the artifact is served.
        tensors_sha256 = merged.tensors_sha256 if self._device.type == "cpu" else None
        embeddings = frozenset(module for module, f in merged.factors.items() if f.embedding)
        return self._placing.place(plan, pairs, tensors_sha256, seconds, "merge", embeddings)
