# SPDX-License-Identifier: Apache-2.0
"""Every metric of ours in vLLM's /metrics: one table, from which the rest is made and docs/metrics.md is checked.

`python -m vllm_merge.serving.telemetry.metrics` prints the tables of docs/metrics.md.

Labels are few and bounded: names of the recipe file, `adhoc`, experiments and arms, tiers, ranks; never a string of a request.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0)

WORKER_LABELS = ("engine", "rank")
ASKED = ("recipe", "experiment", "arm")

ADHOC = "adhoc"
OTHER = "other"  # what is beyond the bounds
NAMES_KEPT = 1000  # label values of one kind that a process ever gives out


@dataclass(frozen=True)
class Metric:
    """source: `requests` (counted by the API processes), `server` (what they serve) or `worker` (asked at a scrape).

    labels: without those of the worker, which every worker's metric has beside. buckets: of a histogram, upper bounds in seconds.
    """

    kind: Literal["counter", "gauge", "histogram"]
    source: Literal["requests", "server", "worker"]
    labels: tuple[str, ...]
    help: str
    buckets: tuple[float, ...] = ()

    @property
    def all_labels(self) -> tuple[str, ...]:
        return (*WORKER_LABELS, *self.labels) if self.source == "worker" else self.labels


METRICS: Mapping[str, Metric] = {
    # what clients saw
    "vllm_merge_requests_total": Metric(
        "counter",
        "requests",
        (*ASKED, "outcome"),
        "Requests for names of ours. outcome: ok, rejected (4xx), unavailable (503), error (other 5xx, or a stream that broke), "
        "client_left.",
    ),
    "vllm_merge_fallbacks_total": Metric(
        "counter", "requests", ("recipe",), "Requests that a stand-in answered, because the artifact was not in memory."
    ),
    "vllm_merge_request_seconds": Metric(
        "histogram", "requests", ASKED, "Whole requests that were answered, a wait for a merge included.", SECONDS
    ),
    "vllm_merge_time_to_first_token_seconds": Metric(
        "histogram", "requests", ASKED, "Until the first piece of a stream, a wait for a merge included.", SECONDS
    ),
    "vllm_merge_inter_token_seconds": Metric(
        "histogram", "requests", ASKED, "Between two pieces of a stream.", TOKEN_SECONDS
    ),
    "vllm_merge_prompt_tokens_total": Metric("counter", "requests", ASKED, "Tokens of prompts."),
    "vllm_merge_completion_tokens_total": Metric("counter", "requests", ASKED, "Tokens of answers."),
    "vllm_merge_wait_seconds": Metric(
        "histogram",
        "requests",
        ("tier",),
        "How long a request waited for its artifact, by where that came from: cache, host, disk, merge, or failed.",
        SECONDS,
    ),
    "vllm_merge_shadows_total": Metric(
        "counter",
        "requests",
        ("experiment", "arm", "outcome"),
        "Requests that an arm was to answer a second time, for comparison. outcome: ok, too_many, busy, unavailable, timeout, "
        "failed.",
    ),
    # what is served
    "vllm_merge_generation": Metric(
        "gauge", "server", (), "How many states of the recipe file and aliases were served."
    ),
    "vllm_merge_config_error": Metric(
        "gauge", "server", (), "1: the recipe file is newer than what is served, and wrong. /v1/merge/recipes says why."
    ),
    "vllm_merge_recipe_failed": Metric(
        "gauge", "server", ("recipe",), "1: the name has no artifact, or its last merge failed."
    ),
    "vllm_merge_worker_up": Metric(
        "gauge",
        "server",
        WORKER_LABELS,
        "1: the worker answered this scrape. 0: its other metrics are the last it gave.",
    ),
    # what merges
    "vllm_merge_merges_total": Metric(
        "counter",
        "worker",
        ("recipe", "outcome"),
        "Merges that ended. outcome: done, failed, stopped (cancelled, or no memory), refused (the queue is full).",
    ),
    "vllm_merge_merge_seconds": Metric("histogram", "worker", (), "Merges that were done, reading included.", SECONDS),
    "vllm_merge_stage_seconds_total": Metric(
        "counter",
        "worker",
        ("stage",),
        "Seconds of merges by stage: queue, read, prepare, statistics, merge, truncate, factors, report, place, hash.",
    ),
    "vllm_merge_queue_length": Metric("gauge", "worker", (), "Merges that wait."),
    "vllm_merge_queue_limit": Metric("gauge", "worker", (), "Merges that may wait (VLLM_MERGE_QUEUE)."),
    "vllm_merge_merging": Metric("gauge", "worker", (), "Merges that run: 0 or 1."),
    "vllm_merge_waiters": Metric("gauge", "worker", (), "Callers that wait for an artifact."),
    "vllm_merge_merged_elsewhere_total": Metric(
        "counter", "worker", (), "Artifacts that another replica merged while this one waited for the shared disk."
    ),
    # where artifacts are
    "vllm_merge_artifact_lookups_total": Metric(
        "counter",
        "worker",
        ("tier",),
        "Artifacts made ready, by where they were: cache, host, disk, or merge (nowhere).",
    ),
    "vllm_merge_tier_bytes": Metric(
        "gauge", "worker", ("tier",), "Bytes of artifacts in cache, host and disk. The disk's are of all who share it."
    ),
    "vllm_merge_tier_budget_bytes": Metric("gauge", "worker", ("tier",), "Bytes that a tier may hold."),
    "vllm_merge_tier_artifacts": Metric("gauge", "worker", ("tier",), "Artifacts in cache and host memory."),
    "vllm_merge_tier_evictions_total": Metric(
        "counter", "worker", ("tier",), "Artifacts that left a tier to make room, or were evicted by hand."
    ),
    "vllm_merge_cache_other_bytes": Metric(
        "gauge", "worker", (), "Bytes of the cache's budget that adapters of vLLM's own take."
    ),
    "vllm_merge_artifacts_leased": Metric("gauge", "worker", (), "Artifacts that running requests hold."),
    "vllm_merge_artifacts_pinned": Metric("gauge", "worker", (), "Artifacts that are pinned."),
    "vllm_merge_slots_used": Metric("gauge", "worker", (), "LoRA slots that hold an artifact of ours."),
    "vllm_merge_slots": Metric("gauge", "worker", (), "LoRA slots (--max-loras)."),
    "vllm_merge_slot_bytes": Metric("gauge", "worker", (), "Bytes of all LoRA slots; 0 where vLLM fills them itself."),
    "vllm_merge_source_bytes": Metric("gauge", "worker", (), "Bytes of adapters kept in host memory to be merged."),
    "vllm_merge_source_budget_bytes": Metric("gauge", "worker", (), "Bytes of adapters that may be kept so."),
    "vllm_merge_source_lookups_total": Metric(
        "counter", "worker", ("found",), "Adapters that merges asked for, by where they were: memory or file."
    ),
    # what should not happen
    "vllm_merge_disk_errors_total": Metric(
        "counter", "worker", (), "Reads, writes and claims that the disk tier's place failed."
    ),
    "vllm_merge_broken_promises_total": Metric(
        "counter", "worker", (), "Artifacts that were missing when vLLM needed them; their requests failed."
    ),
    "vllm_merge_asleep": Metric("gauge", "worker", (), "1: vLLM sleeps, and so do merges."),
}


class Bounded:
    """Label values that a process has given out: the first `limit`, and `other` for all that come later."""

    def __init__(self, limit: int = NAMES_KEPT) -> None:
        self._limit = limit
        self._given: set[tuple[str, ...]] = set()

    def __call__(self, *values: str) -> tuple[str, ...]:
        if values not in self._given:
            if len(self._given) >= self._limit:
                return (OTHER,) * len(values)
            self._given.add(values)
        return values


HEADINGS = {
    "requests": "What clients saw",
    "server": "What is served",
    "worker": "What each worker does",
}


def tables() -> dict[str, str]:
    """{source: its Markdown table}."""
    found = {}
    for source in HEADINGS:
        rows = ["| metric | kind | labels | what |", "|---|---|---|---|"]
        for name, metric in METRICS.items():
            if metric.source == source:
                labels = ", ".join(f"`{label}`" for label in metric.all_labels) or "–"
                rows.append(f"| `{name}` | {metric.kind} | {labels} | {metric.help} |")
        found[source] = "\n".join(rows)
    return found


if __name__ == "__main__":
    for source, rows in tables().items():
        print(f"## {HEADINGS[source]}\n\n{rows}\n")
