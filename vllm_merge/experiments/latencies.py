# SPDX-License-Identifier: Apache-2.0
"""One latency of every arm: any quantile of it, with an interval that holds at all times at once."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_merge.experiments.readings import Histogram, Readings
from vllm_merge.experiments.statistics.quantile import design_effect, quantile_interval
from vllm_merge.experiments.statistics.sequence import ALPHA, Interval

_UNKNOWN = Interval(0.0, float("inf"))


@dataclass(frozen=True)
class Latencies:
    """histograms: {arm: binned latencies}; effects: {arm: how many of them say as much as one independent one}."""

    histograms: dict[str, Histogram]
    effects: dict[str, float]

    @classmethod
    def read(cls, readings: Readings, latency: str) -> Latencies:
        histograms = readings.histogram(latency)
        if all(found["units"] == found["requests"] for found in readings.counts.values()):
            return cls(histograms, dict.fromkeys(histograms, 1.0))  # nobody came twice
        clusters = readings.clusters(latency, histograms)
        return cls(histograms, {arm: design_effect(clusters[arm]) for arm in histograms})

    def quantile(self, arm: str, quantile: float, alpha: float = ALPHA) -> tuple[float | None, Interval]:
        """Seconds, and the (1 − alpha) confidence sequence; (None, all there is) without latencies."""
        found = self.histograms.get(arm)
        if found is None:
            return None, _UNKNOWN
        return quantile_interval(found.edges, found.counts, quantile, self.effects[arm], alpha)
