# SPDX-License-Identifier: Apache-2.0
"""Waits for artifacts as OpenTelemetry spans, beside vLLM's own span of a request and under the client's trace.

On where this process has a tracer provider: vLLM sets one with --otlp-traces-endpoint. Otherwise nothing is imported and a
wait is only counted. All spans are made by the API process, from the times that workers give with their answers, so that a
worker needs no exporter.

    vllm_merge.wait            a request waits until its artifact is in memory
      vllm_merge.<step>        what a worker did for it: queue, read, merge, place; one of each for every worker
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from vllm_merge.serving.requests import outcome
from vllm_merge.serving.telemetry.metrics_requests import request_metrics

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

TIERS = ("cache", "host", "disk", "merge")  # from near to far
FAILED = "failed"

_tracer: Tracer | None = None


def begin() -> bool:
    """Make spans from now on, if a tracer provider was set in this process; says whether."""
    global _tracer
    _tracer = None
    try:
        from opentelemetry import trace
    except ImportError:
        return False
    if isinstance(trace.get_tracer_provider(), (trace.ProxyTracerProvider, trace.NoOpTracerProvider)):
        return False
    _tracer = trace.get_tracer("vllm_merge")
    return True


def tracer() -> Tracer | None:
    """What makes spans; None where this process does not trace."""
    return _tracer


class TraceContextMiddleware:
    """Pure ASGI. Lets spans of ours have the client's span (its `traceparent` header) for a parent."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if _tracer is None or scope["type"] != "http":
            return await self._app(scope, receive, send)
        from opentelemetry import context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        token = context.attach(TraceContextTextMapPropagator().extract(Headers(scope=scope)))
        try:
            await self._app(scope, receive, send)
        finally:
            context.detach(token)


@dataclass
class Wait:
    """replies: the workers' answers, once they came; places: who gave them."""

    replies: Sequence[Mapping[str, Any]] = ()
    places: Sequence[Mapping[str, Any]] = ()

    def came(self, replies: Sequence[Mapping[str, Any]], places: Sequence[Mapping[str, Any]]) -> None:
        self.replies, self.places = replies, places

    @property
    def tier(self) -> str:
        """The farthest tier that a worker had to go to."""
        tiers = [reply["tier"] for reply in self.replies]
        return max(tiers, key=TIERS.index) if tiers else FAILED


@contextmanager
def waiting(label: str) -> Iterator[Wait]:
    """A request waits for the artifact of this label until the block ends; `Wait.came` says with what."""
    wait, started = Wait(), time.monotonic()
    began = time.time_ns() if _tracer is not None else 0
    error: BaseException | None = None
    try:
        yield wait
    except BaseException as raised:
        error = raised
        raise
    finally:
        request_metrics().waited(wait.tier, time.monotonic() - started)
        if _tracer is not None:
            _trace(_tracer, label, wait, began, error)


def _trace(tracer: Tracer, label: str, wait: Wait, began: int, error: BaseException | None) -> None:
    from opentelemetry.trace import Status, StatusCode, set_span_in_context

    attributes = {
        "gen_ai.request.model": outcome.asked_name() or label,
        "gen_ai.response.model": label,
        "vllm_merge.tier": wait.tier,
    }
    span = tracer.start_span("vllm_merge.wait", attributes=attributes, start_time=began)
    inside = set_span_in_context(span)
    for place, reply in zip(wait.places, wait.replies, strict=True):
        for step in reply.get("steps", ()):
            start = round(step["began"] * 1e9)
            facts = {
                "vllm_merge.engine": place["engine"],
                "vllm_merge.rank": place["rank"],
                "gen_ai.response.model": label,
            }
            facts |= {f"vllm_merge.seconds.{stage}": seconds for stage, seconds in step.get("stages", {}).items()}
            child = tracer.start_span(f"vllm_merge.{step['name']}", inside, attributes=facts, start_time=start)
            child.end(start + round(step["seconds"] * 1e9))
    if error is not None:
        span.set_status(Status(StatusCode.ERROR, type(error).__name__))
        span.record_exception(error)
    span.end()
