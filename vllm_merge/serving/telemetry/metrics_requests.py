# SPDX-License-Identifier: Apache-2.0
"""What the API processes count: their requests' outcomes, times and tokens, and waits for artifacts.

These are prometheus_client's own metrics, so that vLLM's /metrics has them, and sums those of several API processes.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from functools import cache

from prometheus_client import Counter, Histogram
from prometheus_client.registry import REGISTRY, CollectorRegistry

from vllm_merge.serving.requests.answers import AnswerFacts
from vllm_merge.serving.telemetry.metrics import ADHOC, METRICS, OTHER, Bounded

CLIENT_LEFT = "client_left"


class RequestMetrics:
    """known(name): whether the recipe file has a name (recipe, alias, adapter or experiment) now. arms(experiment): the arms
    that it has now, of an experiment.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.known: Callable[[str], bool] = lambda name: False
        self.arms: Callable[[str], Container[str]] = lambda experiment: ()
        self._asked, self._fallbacks = Bounded(), Bounded()
        self._counters: dict[str, Counter] = {}
        self._histograms: dict[str, Histogram] = {}
        for name, metric in METRICS.items():
            if metric.source != "requests":
                continue
            if metric.kind == "counter":
                self._counters[name] = Counter(name, metric.help, metric.labels, registry=registry)
            else:
                self._histograms[name] = Histogram(
                    name, metric.help, metric.labels, buckets=metric.buckets, registry=registry
                )

    def note(self, facts: AnswerFacts) -> None:
        """Count one request. Called for each when its answer has ended."""
        recipe = ADHOC if facts.kind == ADHOC else self._name(facts.recipe)
        asked = self._asked(recipe, *self._arm(facts))
        outcome = outcome_of(facts)
        self._counters["vllm_merge_requests_total"].labels(*asked, outcome).inc()
        if facts.fallback:
            self._counters["vllm_merge_fallbacks_total"].labels(*self._fallbacks(recipe)).inc()
        if facts.prompt_tokens:
            self._counters["vllm_merge_prompt_tokens_total"].labels(*asked).inc(facts.prompt_tokens)
        if facts.completion_tokens:
            self._counters["vllm_merge_completion_tokens_total"].labels(*asked).inc(facts.completion_tokens)
        if outcome == "ok":
            self._histograms["vllm_merge_request_seconds"].labels(*asked).observe(facts.seconds)
        if facts.first_token is not None:
            self._histograms["vllm_merge_time_to_first_token_seconds"].labels(*asked).observe(facts.first_token)
        if facts.gaps:
            between = self._histograms["vllm_merge_inter_token_seconds"].labels(*asked)
            for gap in facts.gaps:
                between.observe(gap)

    def waited(self, tier: str, seconds: float) -> None:
        """Count a wait for an artifact. tier: where it came from, or `failed`."""
        self._histograms["vllm_merge_wait_seconds"].labels(tier).observe(seconds)

    def shadowed(self, experiment: str, arm: str, outcome: str) -> None:
        """Count a request that an arm was to answer for comparison."""
        self._counters["vllm_merge_shadows_total"].labels(*self._of_arm(experiment, arm), outcome).inc()

    def _name(self, name: str) -> str:
        return name if name == ADHOC or self.known(name) else OTHER

    def _arm(self, facts: AnswerFacts) -> tuple[str, str]:
        return self._of_arm(facts.experiment, facts.arm) if facts.experiment else ("", "")

    def _of_arm(self, experiment: str, arm: str) -> tuple[str, str]:
        if not self.known(experiment):
            return OTHER, OTHER
        return experiment, arm if arm in self.arms(experiment) else OTHER


def outcome_of(facts: AnswerFacts) -> str:
    """The word for what became of a request."""
    if facts.error == CLIENT_LEFT:
        return CLIENT_LEFT
    if facts.status == 503:
        return "unavailable"
    if 400 <= facts.status < 500:
        return "rejected"
    return "error" if facts.error is not None or facts.status >= 500 or not facts.status else "ok"


@cache
def request_metrics() -> RequestMetrics:
    """Those of this process, in the registry that vLLM's own are in."""
    return RequestMetrics(REGISTRY)
