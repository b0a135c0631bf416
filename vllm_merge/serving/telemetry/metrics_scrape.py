# SPDX-License-Identifier: Apache-2.0
"""What is scraped beside vLLM's own: the workers' numbers, and what is served, behind the answer of /metrics.

An API process asks every worker over the control line when it is scraped, with a time limit, and at most once a second.
So whichever of several processes answers a scrape gives every worker's numbers once.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Container, Iterator, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vllm_merge.recipe.file import RecipeFile
from vllm_merge.serving.control.control import ControlError, WorkerLink
from vllm_merge.serving.control.front import FrontDoor
from vllm_merge.serving.control.published import Published
from vllm_merge.serving.requests import answers
from vllm_merge.serving.telemetry import tracing
from vllm_merge.serving.telemetry.metrics import ADHOC, METRICS
from vllm_merge.serving.telemetry.metrics_requests import request_metrics
from vllm_merge.serving.telemetry.metrics_tally import Sample

logger = logging.getLogger("vllm_merge")

PATH = "/metrics"
ASK_SECONDS = 3.0  # how long a worker may take to answer
FRESH_SECONDS = 1.0  # how long its answer is used again


class ServerMetrics:
    """The metrics that are not of requests, of an API process whose names and workers these are."""

    def __init__(self, front: FrontDoor, published: Published) -> None:
        self._front, self._published = front, published
        self._lock = asyncio.Lock()
        self._asked = float("-inf")
        self._samples: dict[WorkerLink, Sequence[Sample]] = {}
        self._failed: dict[WorkerLink, Sequence[str]] = {}
        self._up: set[WorkerLink] = set()
        self._registry = CollectorRegistry()
        self._registry.register(self)

    async def text(self) -> bytes:
        """In Prometheus' text format, as of now."""
        async with self._lock:
            if time.monotonic() - self._asked > FRESH_SECONDS:
                await asyncio.gather(*(self._ask(link) for link in self._front.links.all))
                self._asked = time.monotonic()
        return generate_latest(self._registry)

    async def _ask(self, link: WorkerLink) -> None:
        try:
            async with asyncio.timeout(ASK_SECONDS):
                reply = await link.call("metrics")
        except (ControlError, TimeoutError):
            self._up.discard(link)
            return
        self._up.add(link)
        self._samples[link], self._failed[link] = reply["samples"], reply["failed"]

    def collect(self) -> Iterator[Metric]:
        families = {name: _family(name) for name, metric in METRICS.items() if metric.source in ("worker", "server")}
        state = self._published.state
        families["vllm_merge_generation"].add_metric((), state.generation)
        families["vllm_merge_config_error"].add_metric((), float(state.error is not None))
        failed = {digest for digests in self._failed.values() for digest in digests}
        for known in self._front.names.values():
            if known.kind != ADHOC:
                wrong = known.digest is None or known.digest in failed
                families["vllm_merge_recipe_failed"].add_metric((known.name,), float(wrong))
        for link in self._front.links.all:
            place = (str(link.facts["engine"]), str(link.facts["rank"]))
            families["vllm_merge_worker_up"].add_metric(place, float(link in self._up))
            for name, labels, value in self._samples.get(link, ()):
                if METRICS[name].kind == "histogram":
                    counts, total = value
                    families[name].add_metric((*place, *labels), _cumulative(name, counts), total)
                else:
                    families[name].add_metric((*place, *labels), value)
        yield from families.values()


def _family(name: str) -> Any:
    metric = METRICS[name]
    kinds = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily, "histogram": HistogramMetricFamily}
    return kinds[metric.kind](name, metric.help, labels=metric.all_labels)


def _cumulative(name: str, counts: Sequence[int]) -> list[tuple[str, float]]:
    bounds = [*map(str, METRICS[name].buckets), "+Inf"]
    total, found = 0, []
    for bound, count in zip(bounds, counts, strict=True):
        total += count
        found.append((bound, float(total)))
    return found


def observe(front: FrontDoor, published: Published) -> ServerMetrics:
    """Begin to count this process's requests and to trace its waits; returns what is scraped beside."""
    requests = request_metrics()
    requests.known = lambda name: name in front.names and front.names[name].kind != ADHOC
    requests.arms = lambda experiment: _arms(published.state.names.recipes, experiment)
    answers.subscribe(requests.note)
    published.experiments.shadows.note = requests.shadowed
    tracing.begin()
    return ServerMetrics(front, published)


def _arms(recipes: RecipeFile, experiment: str) -> Container[str]:
    found = recipes.experiments.get(experiment)
    return found.arms if found is not None else ()


class ScrapeMiddleware:
    """Pure ASGI. Puts `app.state.vllm_merge_metrics`, once it is there, behind what vLLM answers at /metrics."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        ours: ServerMetrics | None = None
        if scope["type"] == "http" and scope["path"].removeprefix(scope.get("root_path", "")).rstrip("/") == PATH:
            ours = getattr(scope["app"].state, "vllm_merge_metrics", None)
        if ours is None or scope["method"] != "GET":
            return await self._app(scope, receive, send)
        # Without these vLLM answers in the plain text format, to which lines can be added.
        headers = [(k, v) for k, v in scope["headers"] if k.lower() not in (b"accept", b"accept-encoding")]
        try:
            more = await ours.text()
        except Exception:  # vLLM's own metrics are worth more than ours
            logger.exception("our metrics are missing from this scrape")
            more = b""
        start: Message | None = None
        body = bytearray()

        async def behind(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start":
                start = message
                return
            body.extend(message.get("body", b""))
            if start is None or message.get("more_body", False):
                return
            if start["status"] == 200:
                body.extend(more)
                MutableHeaders(scope=start)["content-length"] = str(len(body))
            await send(start)
            await send({"type": "http.response.body", "body": bytes(body)})

        return await self._app({**scope, "headers": headers}, receive, behind)
