# SPDX-License-Identifier: Apache-2.0
"""A worker's merges that wait: a bounded line, and an estimate of how long it takes."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import deque
from dataclasses import dataclass, field

from vllm_merge.errors import MergeError
from vllm_merge.recipe.plan import Plan
from vllm_merge.serving.memory.residency import ResidentArtifact

FIRST_GUESS_SECONDS = 5.0  # of a merge, before any was timed
WEIGHT_OF_LATEST = 0.3  # in the running mean of a merge's seconds


class TooManyMerges(MergeError):
    """The line is full. retry_after: seconds after which there may be room."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


@dataclass(eq=False)
class Job:
    """One artifact that is being made resident, wanted by any number of requests."""

    plan: Plan
    future: asyncio.Future[ResidentArtifact]
    status: str = "looking"  # looking (in the tiers) | queued | merging | elsewhere
    done: int = 0
    total: int = 0
    deadline: float = math.inf  # time.monotonic, from when it merges
    cancelled: threading.Event = field(default_factory=threading.Event)
    waiters: int = 0
    timer: asyncio.TimerHandle | None = None
    queued: float = field(default_factory=time.time)  # when it began to wait for its merge, seconds since 1970

    @property
    def late(self) -> bool:
        return time.monotonic() > self.deadline

    def stopped(self) -> bool:
        """Whether the merge is to stop: asked at every batch."""
        return self.cancelled.is_set() or self.late


def too_long(job: Job, seconds: float) -> MergeError:
    """What is said of a merge that took longer than it may."""
    return MergeError(
        f"the merge of {job.plan.artifact_name} took longer than {seconds} s and was stopped (VLLM_MERGE_TIME_LIMIT)"
    )


class Line:
    """First in, first out. `get` blocks in the merging thread; the rest is called from the control thread."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._waiting: deque[Job] = deque()
        self._running = 0
        self._mean = FIRST_GUESS_SECONDS
        self._changed = threading.Condition()

    def put(self, job: Job) -> None:
        """Raises TooManyMerges when as many merges wait as may. An adapter by itself is only read, and always let in."""
        with self._changed:
            merges = sum(waiting.plan.kind == "recipe" for waiting in self._waiting)
            if job.plan.kind == "recipe" and merges >= self._limit:
                raise TooManyMerges(
                    f"{self._limit} merges are waiting already (VLLM_MERGE_QUEUE)", self._seconds(merges)
                )
            job.status, job.queued = "queued", time.time()
            self._waiting.append(job)
            self._changed.notify()

    def get(self) -> Job:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting)
            self._running = 1
            job = self._waiting.popleft()
            job.status = "merging"
            return job

    def ended(self, seconds: float | None) -> None:
        """The job that `get` gave is over; seconds: of a whole merge, None for one that failed or was stopped."""
        with self._changed:
            self._running = 0
            if seconds is not None:
                self._mean += WEIGHT_OF_LATEST * (seconds - self._mean)

    def remove(self, job: Job) -> bool:
        """Take out a job that still waits; says whether it did."""
        with self._changed:
            if job not in self._waiting:
                return False
            self._waiting.remove(job)
            return True

    def retry_after(self) -> int:
        """Seconds until a merge that came now would be done, at least 1."""
        with self._changed:
            return self._seconds(len(self._waiting) + 1)

    def describe(self) -> dict[str, int | float]:
        with self._changed:
            return {"waiting": len(self._waiting), "limit": self._limit, "mean_seconds": round(self._mean, 4)}

    def _seconds(self, merges: int) -> int:
        return max(1, math.ceil((self._running + merges) * self._mean))
