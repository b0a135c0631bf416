# SPDX-License-Identifier: Apache-2.0
"""What a worker tells every API process by itself: how its merges go, and what leaves its cache."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from vllm_merge.serving.control.control import Message
from vllm_merge.serving.memory.residency import ResidentArtifact
from vllm_merge.serving.worker.jobs import Job

EVENT = "news"  # of the control line
PROGRESS_SECONDS = 0.5  # between two reports of one merge


class News:
    """send(event) may be called from any thread. place: {engine, rank} of the worker."""

    def __init__(self, send: Callable[[Message], None], place: Message) -> None:
        self._send, self._place = send, place
        self._reported = 0.0

    def started(self, job: Job) -> None:
        self._reported = time.monotonic()
        self._merge(job, "started")

    def progress(self, job: Job) -> None:
        """Called at every batch of the one merge that runs; tells of it now and then."""
        now = time.monotonic()
        if now - self._reported >= PROGRESS_SECONDS:
            self._reported = now
            self._merge(job, "progress", done=job.done, total=job.total)

    def ended(self, job: Job, result: ResidentArtifact | Exception) -> None:
        if isinstance(result, ResidentArtifact):
            facts = {"origin": result.origin, "rank": result.rank, "bytes": result.nbytes}
            self._merge(job, "ready", seconds=round(result.seconds, 6), **facts)
        else:
            self._merge(job, "failed", reason=str(result))

    def evicted(self, artifact: ResidentArtifact) -> None:
        self._tell("eviction", artifact=artifact.name, digest=artifact.digest, bytes=artifact.nbytes)

    def _merge(self, job: Job, state: str, **facts: Any) -> None:
        self._tell("merge", state=state, artifact=job.plan.artifact_name, digest=job.plan.digest, **facts)

    def _tell(self, kind: str, **data: Any) -> None:
        self._send({"event": EVENT, "kind": kind, "data": {**data, "worker": self._place}})
