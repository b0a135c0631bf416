# SPDX-License-Identifier: Apache-2.0
"""What a worker counts for /metrics, and how it says it.

No prometheus_client here: with several API processes its values are files that every process of the server adds to, and what
a worker counts would then be there twice. A worker keeps plain numbers, and whoever is scraped asks for them.
"""

from __future__ import annotations

import bisect
import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from vllm_merge.errors import MergeCancelled
from vllm_merge.recipe.adhoc import STAGE
from vllm_merge.recipe.plan import Plan
from vllm_merge.serving.memory.residency import OutOfBudget
from vllm_merge.serving.telemetry.metrics import ADHOC, METRICS, Bounded
from vllm_merge.serving.worker.jobs import TooManyMerges

Sample = tuple[str, Sequence[str], Any]
"""(metric, label values without the worker's, number; of a histogram: (counts by bucket, sum))."""


class Tally:
    """Counters and histograms of one worker. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counters: defaultdict[tuple[str, tuple[str, ...]], float] = defaultdict(float)
        self._histograms: dict[str, tuple[list[int], list[float]]] = {
            name: ([0] * (len(metric.buckets) + 1), [0.0])
            for name, metric in METRICS.items()
            if metric.source == "worker" and metric.kind == "histogram"
        }
        self._names = Bounded()

    def count(self, name: str, *labels: str, by: float = 1) -> None:
        with self._lock:
            self._counters[name, labels] += by

    def observe(self, name: str, value: float) -> None:
        with self._lock:
            counts, total = self._histograms[name]
            counts[bisect.bisect_left(METRICS[name].buckets, value)] += 1
            total[0] += value

    def stages(self, seconds: Mapping[str, float]) -> None:
        for name, value in seconds.items():
            self.count("vllm_merge_stage_seconds_total", name, by=value)

    def ended(self, plan: Plan, error: Exception | None) -> None:
        """A merge is over; error: why it gave nothing."""
        with self._lock:
            (recipe,) = self._names(ADHOC if plan.name == STAGE else plan.name)
        self.count("vllm_merge_merges_total", recipe, _outcome(error))

    def samples(self) -> list[Sample]:
        with self._lock:
            counters: list[Sample] = [(name, labels, value) for (name, labels), value in self._counters.items()]
            return counters + [(n, (), (list(counts), total[0])) for n, (counts, total) in self._histograms.items()]


def _outcome(error: Exception | None) -> str:
    if error is None:
        return "done"
    if isinstance(error, TooManyMerges):
        return "refused"
    return "stopped" if isinstance(error, (MergeCancelled, OutOfBudget, torch.OutOfMemoryError)) else "failed"
