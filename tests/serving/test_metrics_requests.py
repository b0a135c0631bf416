# SPDX-License-Identifier: Apache-2.0
"""What is counted of requests: each once, under few labels, and summed over API processes."""

import json
import subprocess
import sys

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from vllm_merge.serving.requests.answers import AnswerFacts
from vllm_merge.serving.telemetry.metrics import METRICS
from vllm_merge.serving.telemetry.metrics_requests import RequestMetrics, outcome_of

NAMES = {"support", "code", "assistant", "assistant-ab"}


def facts(recipe="support", **changes) -> AnswerFacts:
    given = {"kind": "recipe", "status": 200, "seconds": 1.0, "label": f"{recipe}@1", "route": "/v1/completions"}
    return AnswerFacts(name=recipe, recipe=recipe, started=0.0, wall=0.0, **{**given, **changes})


@pytest.fixture
def metrics():
    registry = CollectorRegistry()
    found = RequestMetrics(registry)
    found.known = NAMES.__contains__
    found.arms = {"assistant-ab": ("control", "new")}.get
    found.registry = registry
    return found


def value(metrics, name, **labels) -> float:
    return metrics.registry.get_sample_value(name, {"experiment": "", "arm": "", **labels}) or 0.0


def test_a_stream_is_counted_once_with_its_times_and_tokens(metrics):
    stream = {"streaming": True, "first_token": 0.2, "gaps": [0.01, 0.02, 0.4]}
    metrics.note(facts(**stream, prompt_tokens=11, completion_tokens=4))
    asked = {"recipe": "support"}
    assert value(metrics, "vllm_merge_requests_total", **asked, outcome="ok") == 1
    assert value(metrics, "vllm_merge_prompt_tokens_total", **asked) == 11
    assert value(metrics, "vllm_merge_completion_tokens_total", **asked) == 4
    assert value(metrics, "vllm_merge_time_to_first_token_seconds_sum", **asked) == pytest.approx(0.2)
    assert value(metrics, "vllm_merge_inter_token_seconds_count", **asked) == 3
    assert value(metrics, "vllm_merge_inter_token_seconds_bucket", **asked, le="0.025") == 2
    assert value(metrics, "vllm_merge_request_seconds_count", **asked) == 1
    assert metrics.registry.get_sample_value("vllm_merge_fallbacks_total", asked) is None


def test_an_arm_has_its_own_numbers(metrics):
    arm = {"kind": "experiment", "experiment": "assistant-ab"}
    metrics.note(facts("assistant-ab", arm="control", **arm))
    metrics.note(facts("assistant-ab", arm="new", status=500, error="http_500", **arm))
    metrics.note(facts("assistant-ab", arm="new", **arm))
    series = {"recipe": "assistant-ab", "experiment": "assistant-ab"}
    assert value(metrics, "vllm_merge_requests_total", **series, arm="control", outcome="ok") == 1
    assert value(metrics, "vllm_merge_requests_total", **series, arm="new", outcome="ok") == 1
    assert value(metrics, "vllm_merge_requests_total", **series, arm="new", outcome="error") == 1
    assert value(metrics, "vllm_merge_request_seconds_count", **series, arm="new") == 1, "of what was answered"


def test_a_stand_in_is_counted(metrics):
    metrics.note(facts(fallback="support@1"))
    assert metrics.registry.get_sample_value("vllm_merge_fallbacks_total", {"recipe": "support"}) == 1


@pytest.mark.parametrize(
    ("status", "error", "outcome"),
    [
        (200, None, "ok"),
        (200, "stream_error", "error"),
        (200, "client_left", "client_left"),
        (0, "client_left", "client_left"),
        (0, "failed", "error"),
        (400, "http_400", "rejected"),
        (404, "NotFoundError", "rejected"),
        (500, "merge_failed", "error"),
        (503, "merge_unavailable", "unavailable"),
    ],
)
def test_outcomes(status, error, outcome):
    assert outcome_of(facts(status=status, error=error)) == outcome


ODD = (
    "x" * 4000,
    'a"b\\c\n{le="+Inf"}',
    "naïve-模型-🦙",
    "",
    "../../etc/passwd",
    "%s%n",
    "\x00",
    "support ",
    "SUPPORT",
)


def test_ten_thousand_odd_names_leave_no_label(metrics):
    for number in range(10_000):
        odd = f"{ODD[number % len(ODD)]}{number if number >= len(ODD) else ''}"
        metrics.note(facts(odd, fallback="x@1", streaming=True, first_token=0.1, gaps=[0.1], prompt_tokens=1))
        metrics.note(facts(odd, kind="adhoc", experiment=odd, arm=odd))
        metrics.note(facts("support", experiment="assistant-ab", arm=odd))
    text = generate_latest(metrics.registry).decode()
    labels = {line.split("{")[1].split("}")[0] for line in text.splitlines() if 'recipe="' in line}
    recipes = {part for label in labels for part in label.split(",") if part.startswith("recipe=")}
    assert recipes == {'recipe="other"', 'recipe="adhoc"', 'recipe="support"'}
    arms = {part for label in labels for part in label.split(",") if part.startswith(("arm=", "experiment="))}
    assert arms == {'arm=""', 'arm="other"', 'experiment=""', 'experiment="other"', 'experiment="assistant-ab"'}
    assert value(metrics, "vllm_merge_requests_total", recipe="other", outcome="ok") == 10_000


def test_names_of_ten_thousand_recipe_files_are_bounded(metrics):
    """A file that is rewritten all day must not fill the memory either."""
    metrics.known = lambda name: True
    for number in range(10_000):
        metrics.note(facts(f"recipe-{number}"))
    text = generate_latest(metrics.registry).decode()
    assert sum(line.startswith("vllm_merge_requests_total{") for line in text.splitlines()) == 1001
    assert (
        value(metrics, "vllm_merge_requests_total", recipe="other", experiment="other", arm="other", outcome="ok")
        == 9000
    )


ONE_PROCESS = """
import json, sys
from tests.serving.test_metrics_requests import NAMES, facts
from vllm_merge.serving.telemetry.metrics_requests import request_metrics
metrics = request_metrics()
metrics.known = NAMES.__contains__
for _ in range(int(sys.argv[1])):
    metrics.note(facts(streaming=True, first_token=0.2, gaps=[0.01], completion_tokens=2))
metrics.waited("merge", 3.0)
"""


def test_several_api_processes_are_summed_also_one_that_has_ended(tmp_path, monkeypatch):
    """As vLLM does it with --api-server-count: a folder of values, read by whichever process is scraped."""
    for requests in (3, 4):
        subprocess.run(
            [sys.executable, "-c", ONE_PROCESS, str(requests)],
            check=True,
            timeout=300,
            env={"PROMETHEUS_MULTIPROC_DIR": str(tmp_path), "PYTHONPATH": ".", "PATH": "/usr/bin:/bin"},
        )
    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(tmp_path))
    asked = {"recipe": "support", "experiment": "", "arm": ""}
    assert registry.get_sample_value("vllm_merge_requests_total", {**asked, "outcome": "ok"}) == 7
    assert registry.get_sample_value("vllm_merge_completion_tokens_total", asked) == 14
    assert registry.get_sample_value("vllm_merge_inter_token_seconds_count", asked) == 7
    assert registry.get_sample_value("vllm_merge_wait_seconds_bucket", {"tier": "merge", "le": "5.0"}) == 2
    found = {family.name for family in registry.collect()}
    counted = {name for name, metric in METRICS.items() if metric.source == "requests"}
    assert found <= {name.removesuffix("_total") for name in counted}
    assert json.dumps(sorted(found)).count("vllm_merge_") == len(found)
