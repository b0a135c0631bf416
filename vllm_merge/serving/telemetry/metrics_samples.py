# SPDX-License-Identifier: Apache-2.0
"""From what the parts of a worker say of themselves to samples of its metrics."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from vllm_merge.serving.telemetry.metrics_tally import Sample
from vllm_merge.serving.worker.jobs import Job


def counted_samples(facts: Mapping[str, float], lookups: Mapping[str, Mapping[str, int]]) -> Iterator[Sample]:
    """facts: {metric without its prefix: value}. lookups: {artifact | source: {where: how often}}."""
    for name, value in facts.items():
        yield f"vllm_merge_{name}", (), float(value)
    for what, counts in lookups.items():
        for where, count in counts.items():
            yield f"vllm_merge_{what}_lookups_total", (where,), count


def described_samples(
    cache: Mapping[str, Any], tiers: Mapping[str, Any], line: Mapping[str, Any], jobs: Iterable[Job]
) -> Iterator[Sample]:
    """cache, tiers and line as the store, the tiers and the line of merges describe themselves."""
    running, rows = list(jobs), cache["artifacts"]
    yield "vllm_merge_queue_length", (), line["waiting"]
    yield "vllm_merge_queue_limit", (), line["limit"]
    yield "vllm_merge_merging", (), sum(job.status == "merging" for job in running)
    yield "vllm_merge_waiters", (), sum(job.waiters for job in running)
    yield "vllm_merge_cache_other_bytes", (), cache["others_bytes"]
    yield "vllm_merge_artifacts_leased", (), sum(row["leases"] > 0 for row in rows)
    yield "vllm_merge_artifacts_pinned", (), sum(row["pinned"] for row in rows)
    for tier, facts in {"cache": cache, **tiers}.items():
        if facts is None:
            continue
        yield "vllm_merge_tier_bytes", (tier,), facts["bytes"]
        yield "vllm_merge_tier_budget_bytes", (tier,), facts["budget_bytes"]
        yield "vllm_merge_tier_evictions_total", (tier,), facts["evicted"]
        if "artifacts" in facts:
            yield "vllm_merge_tier_artifacts", (tier,), len(facts["artifacts"])
