# SPDX-License-Identifier: Apache-2.0
"""Waits for artifacts as spans, under the client's trace; and nothing at all where tracing is off."""

import asyncio
import gzip
import http.server
import json
import subprocess
import sys
import threading
import time
import urllib.request
from typing import ClassVar

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from tests.conftest import CONFIG, DEMO, servers
from vllm_merge.serving.requests import outcome
from vllm_merge.serving.telemetry import tracing
from vllm_merge.serving.telemetry.timeline import Timeline

pytest.importorskip("opentelemetry.sdk")

from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
LABEL = "support@0123456789ab"


@pytest.fixture
def spans(monkeypatch):
    """spans() are those that were made so far, by name."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    assert tracing.begin()
    yield lambda: {span.name: span for span in exporter.get_finished_spans()}
    monkeypatch.undo()
    assert not tracing.begin(), "without a provider it is off again"


def steps():
    timeline = Timeline()
    timeline.add("queue", 1000.0, 0.5)
    timeline.add("read", 1000.5, 0.25)
    timeline.add("merge", 1000.75, 2.0, {"statistics": 0.5, "factors": 1.25})
    return timeline.steps


def ask(wait, headers=None):
    """A request that waits as `wait` does, through the middleware that reads the client's span."""

    async def answer(request):
        outcome.begin("assistant")
        await wait()
        return PlainTextResponse("done")

    app = Starlette(routes=[Route("/", answer)])
    app.add_middleware(tracing.TraceContextMiddleware)

    async def run():
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await client.get("/", headers=headers or {})

    return asyncio.run(run())


async def merged():
    with tracing.waiting(LABEL) as wait:
        replies = [{"tier": "disk", "steps": []}, {"tier": "merge", "steps": steps()}]
        wait.came(replies, [{"engine": 0, "rank": 0}, {"engine": 0, "rank": 1}])


def test_a_wait_and_its_steps_are_spans_of_the_clients_trace(spans):
    ask(merged, {"traceparent": f"00-{TRACE}-{PARENT}-01"})
    found = spans()
    assert set(found) == {"vllm_merge.wait", "vllm_merge.queue", "vllm_merge.read", "vllm_merge.merge"}
    wait = found["vllm_merge.wait"]
    assert f"{wait.context.trace_id:032x}" == TRACE
    assert f"{wait.parent.span_id:016x}" == PARENT
    assert wait.attributes == {
        "gen_ai.request.model": "assistant",
        "gen_ai.response.model": LABEL,
        "vllm_merge.tier": "merge",
    }
    merge = found["vllm_merge.merge"]
    assert merge.parent.span_id == wait.context.span_id
    assert (merge.start_time, merge.end_time) == (1000_750_000_000, 1002_750_000_000)
    assert merge.attributes["vllm_merge.rank"] == 1
    assert merge.attributes["vllm_merge.seconds.factors"] == 1.25
    assert merge.attributes["gen_ai.response.model"] == LABEL


def test_without_a_client_span_a_wait_is_a_trace_of_its_own(spans):
    ask(merged)
    assert spans()["vllm_merge.wait"].parent is None


def test_a_wait_that_fails_says_so(spans):
    async def failed():
        with tracing.waiting(LABEL):
            raise ValueError("no such adapter")

    assert ask(failed).status_code == 500
    wait = spans()["vllm_merge.wait"]
    assert wait.status.status_code.name == "ERROR"
    assert wait.events[0].attributes["exception.message"] == "no such adapter"
    assert wait.attributes["vllm_merge.tier"] == "failed"


def test_two_requests_keep_their_own_traces(spans):
    for number in (1, 2):
        ask(merged, {"traceparent": f"00-{number:032x}-{PARENT}-01"})
        assert spans()["vllm_merge.wait"].context.trace_id == number


def test_off_nothing_is_made_and_a_wait_is_still_counted(monkeypatch):
    assert not tracing.begin()
    counted = []
    monkeypatch.setattr(
        tracing, "request_metrics", lambda: type("M", (), {"waited": lambda self, *a: counted.append(a)})()
    )
    monkeypatch.setattr(tracing, "_trace", lambda *args: pytest.fail("tracing is off"))
    assert ask(merged, {"traceparent": f"00-{TRACE}-{PARENT}-01"}).status_code == 200
    ((tier, seconds),) = counted
    assert tier == "merge"
    assert seconds >= 0


def test_off_opentelemetry_is_not_even_needed():
    script = """
import sys
sys.modules["opentelemetry"] = None
from vllm_merge.serving.telemetry import tracing
assert tracing.begin() is False
with tracing.waiting("a@1") as wait:
    wait.came([{"tier": "host"}], [{"engine": 0, "rank": 0}])
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)


def test_a_timeline_counts_stages_once():
    timeline = Timeline()
    with timeline.step("read"):
        pass
    timeline.add("merge", 0.0, 3.0, {"merge": 1.0, "factors": 2.0})
    assert {k: v for k, v in timeline.stages().items() if k != "read"} == {"merge": 1.0, "factors": 2.0}
    assert timeline.stages()["read"] >= 0


class Collector(http.server.BaseHTTPRequestHandler):
    """An OpenTelemetry collector's HTTP receiver, which keeps the spans."""

    spans: ClassVar[list] = []

    def do_POST(self):
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        body = self.rfile.read(int(self.headers["content-length"]))
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            for scope in resource.scope_spans:
                self.spans.extend(scope.spans)
        self.send_response(200)
        self.send_header("content-type", "application/x-protobuf")
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.mark.full
@pytest.mark.server
def test_a_real_server_sends_its_waits_to_the_endpoint_that_vllm_was_given():
    pytest.importorskip("vllm")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{collector.server_port}/v1/traces"
        options = ("--max-loras", "2", "--max-lora-rank", "64", "--otlp-traces-endpoint", endpoint)
        environment = {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf", "OTEL_BSP_SCHEDULE_DELAY": "200"}
        with servers.running(servers.merge_serve(DEMO / "model", CONFIG, *options), environment) as server:
            body = json.dumps({"model": "knots-mean", "prompt": "upper: stone ->", "max_tokens": 1}).encode()
            headers = {"content-type": "application/json", "traceparent": f"00-{TRACE}-{PARENT}-01"}
            request = urllib.request.Request(f"{server.url}/v1/completions", body, headers)
            urllib.request.urlopen(request, timeout=300).read()
            deadline = time.monotonic() + 60
            while not {"vllm_merge.wait", "llm_request"} <= set(found := _of_the_trace(Collector.spans)):
                assert time.monotonic() < deadline, set(found)
                time.sleep(0.1)
        collector.shutdown()
    assert {"vllm_merge.queue", "vllm_merge.read", "vllm_merge.merge", "vllm_merge.place"} <= set(found)
    wait = found["vllm_merge.wait"]
    attributes = {attribute.key: attribute.value.string_value for attribute in wait.attributes}
    assert attributes["gen_ai.request.model"] == "knots-mean"
    assert attributes["gen_ai.response.model"].startswith("knots-mean@")
    assert found["vllm_merge.merge"].parent_span_id == wait.span_id
    assert wait.parent_span_id.hex() == found["llm_request"].parent_span_id.hex() == PARENT


def _of_the_trace(spans) -> dict:
    return {span.name: span for span in list(spans) if span.trace_id.hex() == TRACE}
