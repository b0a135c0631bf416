# SPDX-License-Identifier: Apache-2.0
"""The numbers of workers behind vLLM's own at /metrics: asked once, whole, and the last known where a worker is gone."""

import asyncio
import dataclasses
from types import SimpleNamespace

import httpx
import pytest
from prometheus_client import CollectorRegistry, Counter, make_asgi_app
from prometheus_client.parser import text_string_to_metric_families
from starlette.applications import Starlette
from starlette.routing import Mount

from vllm_merge.errors import MergeError
from vllm_merge.serving.control.control import ControlError
from vllm_merge.serving.control.names import Name
from vllm_merge.serving.telemetry import metrics_scrape
from vllm_merge.serving.telemetry.metrics import METRICS, SECONDS
from vllm_merge.serving.telemetry.metrics_scrape import ScrapeMiddleware, ServerMetrics
from vllm_merge.serving.telemetry.metrics_tally import Tally
from vllm_merge.serving.worker.jobs import TooManyMerges


class Link:
    """A worker that says what its tally has; `hangs` and `gone` as they are named."""

    def __init__(self, engine: int, rank: int):
        self.facts = {"engine": engine, "rank": rank}
        self.tally, self.asked, self.failed = Tally(), 0, []
        self.hangs = self.gone = False

    async def call(self, op):
        assert op == "metrics"
        self.asked += 1
        if self.gone:
            raise ControlError("disconnected", "it is gone")
        if self.hangs:
            await asyncio.Event().wait()
        return {"samples": self.tally.samples(), "failed": self.failed}


@pytest.fixture
def links():
    return [Link(0, 0), Link(0, 1), Link(1, 0), Link(1, 1)]


@pytest.fixture
def server(links, monkeypatch):
    """The Starlette app of a played vLLM, with ours before it."""
    monkeypatch.setattr(metrics_scrape, "FRESH_SECONDS", -1.0)
    monkeypatch.setattr(metrics_scrape, "ASK_SECONDS", 0.05)
    registry = CollectorRegistry()
    Counter("vllm:generation_tokens", "Theirs.", registry=registry).inc(7)
    app = Starlette(routes=[Mount("/metrics", make_asgi_app(registry=registry))])
    app.add_middleware(ScrapeMiddleware)
    names = {
        "good": Name("good", "recipe", "1" * 64, "good@1"),
        "bad": Name("bad", "recipe", "2" * 64, "bad@2"),
        "none": Name("none", "adapter", None, reason="it cannot be read"),
    }
    front = SimpleNamespace(names=names, links=SimpleNamespace(all=links))
    app.state.vllm_merge_metrics = ServerMetrics(
        front, SimpleNamespace(state=SimpleNamespace(generation=3, error=None))
    )
    return app


async def _get(app, path, headers):
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
        return await client.get(path, headers=headers or {}, follow_redirects=True)


def scrape(app, headers=None):
    """{(sample, labels): value}"""
    response = asyncio.run(_get(app, "/metrics", headers))
    assert response.status_code == 200
    assert int(response.headers.get("content-length", len(response.content))) == len(response.content)
    families = list(text_string_to_metric_families(response.text))
    assert len({family.name for family in families}) == len(families), "each family once"
    return {(s.name, *sorted(s.labels.items())): s.value for family in families for s in family.samples}


def place(engine, rank):
    return ("engine", str(engine)), ("rank", str(rank))


def test_every_workers_numbers_stand_behind_vllms(server, links):
    links[0].tally.count("vllm_merge_stage_seconds_total", "read", by=0.5)
    links[3].tally.count("vllm_merge_stage_seconds_total", "read", by=0.25)
    links[0].failed = ["2" * 64]
    found = scrape(server)
    assert found["vllm:generation_tokens_total",] == 7
    assert found["vllm_merge_stage_seconds_total", *place(0, 0), ("stage", "read")] == 0.5
    assert found["vllm_merge_stage_seconds_total", *place(1, 1), ("stage", "read")] == 0.25
    assert [found["vllm_merge_worker_up", *place(e, r)] for e in (0, 1) for r in (0, 1)] == [1, 1, 1, 1]
    assert [found["vllm_merge_recipe_failed", ("recipe", name)] for name in ("good", "bad", "none")] == [0, 1, 1]
    assert (found["vllm_merge_generation",], found["vllm_merge_config_error",]) == (3, 0)


def test_what_a_scraper_accepts_does_not_matter(server):
    """Prometheus asks for OpenMetrics and gzip: ours must not be put behind either."""
    headers = {"accept": "application/openmetrics-text;version=1.0.0", "accept-encoding": "gzip"}
    assert scrape(server, headers).keys() == scrape(server).keys()


def test_a_histogram_is_cumulative_and_whole(server, links):
    for seconds in (0.001, 0.3, 0.5, 1000.0):
        links[0].tally.observe("vllm_merge_merge_seconds", seconds)
    found = scrape(server)
    bucket = {
        bound: found["vllm_merge_merge_seconds_bucket", *place(0, 0)[:1], ("le", bound), *place(0, 0)[1:]]
        for bound in ("0.005", "0.25", "0.5", "300.0", "+Inf")
    }
    assert bucket == {"0.005": 1, "0.25": 1, "0.5": 3, "300.0": 3, "+Inf": 4}
    assert found["vllm_merge_merge_seconds_count", *place(0, 0)] == 4
    assert found["vllm_merge_merge_seconds_sum", *place(0, 0)] == pytest.approx(1000.801)
    assert len([key for key in found if key[0] == "vllm_merge_merge_seconds_bucket" and ("rank", "1") in key]) == 2 * (
        len(SECONDS) + 1
    )


@pytest.mark.parametrize("trouble", ["hangs", "gone"])
def test_a_worker_that_does_not_answer_is_said_and_its_last_numbers_stay(server, links, trouble):
    links[2].tally.count("vllm_merge_stage_seconds_total", "read", by=1)
    scrape(server)
    links[2].tally.count("vllm_merge_stage_seconds_total", "read", by=1)
    setattr(links[2], trouble, True)
    found = scrape(server)
    assert found["vllm_merge_worker_up", *place(1, 0)] == 0
    assert found["vllm_merge_worker_up", *place(0, 0)] == 1
    assert found["vllm_merge_stage_seconds_total", *place(1, 0), ("stage", "read")] == 1
    setattr(links[2], trouble, False)
    found = scrape(server)
    assert found["vllm_merge_worker_up", *place(1, 0)] == 1
    assert found["vllm_merge_stage_seconds_total", *place(1, 0), ("stage", "read")] == 2


def test_a_flood_of_scrapes_asks_each_worker_once(server, links, monkeypatch):
    monkeypatch.setattr(metrics_scrape, "FRESH_SECONDS", 3600.0)

    async def flood():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(server), base_url="http://server") as client:
            return await asyncio.gather(*(client.get("/metrics/") for _ in range(50)))

    assert {response.status_code for response in asyncio.run(flood())} == {200}
    assert [link.asked for link in links] == [1, 1, 1, 1]


def test_before_the_start_is_over_vllm_answers_alone(server):
    server.state.vllm_merge_metrics = None
    assert {key[0] for key in scrape(server)} == {"vllm:generation_tokens_total", "vllm:generation_tokens_created"}


@pytest.mark.parametrize(
    ("error", "outcome"),
    [(None, "done"), (MergeError("x"), "failed"), (TooManyMerges("x", 1), "refused"), (KeyError("x"), "failed")],
)
def test_merges_are_counted_by_recipe_and_outcome(error, outcome):
    tally = Tally()
    tally.ended(SimpleNamespace(name="support"), error)
    tally.ended(SimpleNamespace(name="adhoc()"), error)
    counted = {labels: value for name, labels, value in tally.samples() if name == "vllm_merge_merges_total"}
    assert counted == {("support", outcome): 1, ("adhoc", outcome): 1}


def test_names_that_come_and_go_do_not_make_a_worker_grow():
    tally = Tally()
    for number in range(10_000):
        tally.ended(SimpleNamespace(name=f"recipe-{number}"), None)
    counted = {labels: value for name, labels, value in tally.samples() if name == "vllm_merge_merges_total"}
    assert len(counted) == 1001
    assert sum(counted.values()) == 10_000
    assert counted["other", "done"] == 9_000


def test_the_table_is_well_formed():
    for name, metric in METRICS.items():
        assert name.startswith("vllm_merge_")
        assert (metric.kind == "counter") == name.endswith("_total")
        assert (metric.kind == "histogram") == bool(metric.buckets)
        assert list(metric.buckets) == sorted(metric.buckets)
        assert not {"le", "quantile"} & set(metric.all_labels)
        assert "engine" in metric.all_labels or metric.source != "worker"
    assert {dataclasses.replace(m, help="").source for m in METRICS.values()} == {"requests", "server", "worker"}


def test_a_fault_of_ours_leaves_vllms_metrics(server, caplog):
    server.state.vllm_merge_metrics._published = None
    assert scrape(server)["vllm:generation_tokens_total",] == 7
    assert "our metrics are missing" in caplog.text
