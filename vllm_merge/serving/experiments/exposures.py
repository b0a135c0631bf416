# SPDX-License-Identifier: Apache-2.0
"""What a request's arm leaves behind: headers on its answer, facts for metrics, an exposure in the store, an event in a trace."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from vllm_merge.experiments.records import Exposure
from vllm_merge.serving.requests.answers import AnswerFacts
from vllm_merge.serving.telemetry import tracing

if TYPE_CHECKING:
    from vllm_merge.serving.experiments.experiments import Chosen

EXPERIMENT_HEADER = "x-vllm-merge-experiment"
ARM_HEADER = "x-vllm-merge-arm"
ARTIFACT_HEADER = "x-vllm-merge-artifact"
REASON_HEADER = "x-vllm-merge-reason"
CAUSE_HEADER = "x-vllm-merge-cause"
EXPOSURE_HEADER = "x-vllm-merge-exposure"

_PROVIDER = "vllm-merge"


def headers_of(chosen: Chosen, ticket: str) -> dict[str, str]:
    """For every answer to this request: success, stream or error."""
    found = chosen.assignment
    headers = {
        EXPERIMENT_HEADER: found.flag_key,
        ARM_HEADER: found.variant,
        ARTIFACT_HEADER: chosen.artifact,
        REASON_HEADER: found.reason,
        EXPOSURE_HEADER: ticket,
    }
    return headers | ({CAUSE_HEADER: found.cause.encode("ascii", "replace").decode()} if found.cause else {})


def exposure_of(facts: AnswerFacts, chosen: Chosen) -> Exposure | None:
    """What is kept of an answer. None where vLLM refused the request itself: a wrong request says nothing about an arm that it
    never reached.
    """
    if 400 <= facts.status < 500 and facts.prompt_tokens is None:
        return None
    found, gaps = chosen.assignment, facts.gaps
    return Exposure(
        id=chosen.exposure,
        at=facts.wall,
        experiment=found.flag_key,
        version=chosen.version,
        arm=found.variant,
        artifact=facts.label or chosen.artifact,
        reason=f"{found.reason}: {found.cause}" if found.cause else found.reason,
        unit=chosen.unit,
        unit_kind=chosen.unit_kind,
        status=facts.status,
        error=facts.error or "",
        finish=facts.finish or "",
        prompt_tokens=facts.prompt_tokens,
        completion_tokens=facts.completion_tokens,
        first_token=facts.first_token,
        gap_mean=statistics.fmean(gaps) if gaps else None,
        gap_p99=sorted(gaps)[min(len(gaps) - 1, int(0.99 * len(gaps)))] if gaps else None,
        gap_max=max(gaps, default=None),
        seconds=facts.seconds,
        streaming=facts.streaming,
        refused=facts.refused,
    )


def trace(chosen: Chosen, asked: str) -> None:
    """OpenTelemetry's `feature_flag.evaluation` (semantic conventions for feature flags), where this process traces."""
    tracer = tracing.tracer()
    if tracer is None:
        return
    found = chosen.assignment
    attributes = {
        "feature_flag.key": found.flag_key,
        "feature_flag.result.variant": found.variant,
        "feature_flag.result.reason": found.reason.lower(),
        "feature_flag.context.id": chosen.unit or chosen.exposure,
        "feature_flag.provider.name": _PROVIDER,
        "feature_flag.version": str(chosen.version),
        "feature_flag.set.id": chosen.flag_set,
    }
    models = {"gen_ai.request.model": asked, "gen_ai.response.model": chosen.artifact}
    with tracer.start_as_current_span("vllm_merge.assign", attributes={**attributes, **models}) as span:
        span.add_event("feature_flag.evaluation", attributes)
