# SPDX-License-Identifier: Apache-2.0
"""One job for each artifact that is being made, however many requests wait for it; in the control thread."""

from __future__ import annotations

import asyncio
import logging
import queue

import torch

from vllm_merge.errors import MergeCancelled, MergeError
from vllm_merge.recipe.plan import Plan
from vllm_merge.serving.control.control import ControlError
from vllm_merge.serving.memory.residency import OutOfBudget, ResidentArtifact
from vllm_merge.serving.telemetry.metrics_tally import Tally
from vllm_merge.serving.worker.jobs import Job, Line, TooManyMerges, too_long
from vllm_merge.serving.worker.news import News

logger = logging.getLogger("vllm_merge.worker")

FAILURES_KEPT = 100  # reasons that the status tells


class Making:
    """cold: where jobs wait that are to be looked for in the tiers; None where there are none. time_limit: seconds of a merge."""

    def __init__(
        self, line: Line, cold: queue.SimpleQueue[Job] | None, time_limit: float, news: News, tally: Tally
    ) -> None:
        self._line, self._cold, self._time_limit = line, cold, time_limit
        self._news, self._tally = news, tally
        self.jobs: dict[str, Job] = {}
        """By digest."""
        self.failures: dict[str, str] = {}
        """By digest: why its last merge failed, latest last."""

    async def made(self, plan: Plan) -> ResidentArtifact:
        """From the nearest tier, else merged; once, whoever asks. Raises ControlError."""
        job = self.jobs.get(plan.digest)
        if job is None or job.cancelled.is_set():
            job = self.jobs[plan.digest] = Job(plan, asyncio.get_running_loop().create_future())
            self.failures.pop(plan.digest, None)
            if self._cold is not None:
                self._cold.put(job)
            else:
                self.enqueue(job)
        job.waiters += 1
        try:
            return await asyncio.shield(job.future)
        except asyncio.CancelledError:
            if job.waiters == 1:  # the last one that waited is gone
                job.cancelled.set()
            raise
        finally:
            job.waiters -= 1

    def enqueue(self, job: Job) -> None:
        """No tier has it: let it wait for its merge, or refuse."""
        if job.future.done():
            return  # cancelled while its artifact was looked for
        try:
            self._line.put(job)
        except TooManyMerges as error:
            self.finish(job, error)

    def watch_time(self, job: Job) -> None:
        """Tell who waits as soon as a merge is late, even if it is slow to stop."""
        if not job.future.done():
            loop = asyncio.get_running_loop()
            job.timer = loop.call_later(self._time_limit, lambda: self.finish(job, too_long(job, self._time_limit)))

    def cancel(self, digest: str) -> bool:
        """Stop a merge at its next batch; whoever waits for it is told at once."""
        job = self.jobs.get(digest)
        if job is None:
            return False
        job.cancelled.set()
        self._line.remove(job)
        self.finish(job, MergeCancelled(f"the merge of {job.plan.artifact_name} was cancelled"))
        return True

    def finish(self, job: Job, result: ResidentArtifact | Exception) -> None:
        """A job is over: whoever waits for it is told; what fails is logged and remembered."""
        if self.jobs.get(job.plan.digest) is job:
            del self.jobs[job.plan.digest]
        if job.timer is not None:
            job.timer.cancel()
        if job.future.done():
            return
        self._news.ended(job, result)
        if isinstance(result, ResidentArtifact):
            if result.origin == "merge":
                self._tally.ended(job.plan, None)
                self._tally.observe("vllm_merge_merge_seconds", result.seconds)
            job.future.set_result(result)
            return
        self._tally.ended(job.plan, result)
        failure = _told(result)
        logger.error("merging %s failed: %s", job.plan.artifact_name, failure)
        if failure.kind == "failed":
            self.failures[job.plan.digest] = str(failure)
            while len(self.failures) > FAILURES_KEPT:
                del self.failures[next(iter(self.failures))]
        job.future.set_exception(failure)
        job.future.exception()  # somebody looked, even if every waiter has gone


def _told(error: Exception) -> ControlError:
    """What API processes hear of it: `busy` may pass by itself, `failed` will not."""
    if isinstance(error, TooManyMerges):
        return ControlError("busy", str(error), error.retry_after)
    if isinstance(error, (OutOfBudget, MergeCancelled, torch.OutOfMemoryError)):
        return ControlError("busy", str(error))
    if isinstance(error, MergeError):
        return ControlError("failed", str(error))
    return ControlError("failed", f"{type(error).__name__}: {error}")
