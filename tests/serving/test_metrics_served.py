# SPDX-License-Identifier: Apache-2.0
"""/metrics of a real server: everything that the table promises is there, and counts what was asked."""

import openai
import pytest

from tests.serving.scraping import scraped, total
from vllm_merge.serving.telemetry import metrics_scrape
from vllm_merge.serving.telemetry.metrics import METRICS

ASKED = {"recipe": "weighted", "experiment": "", "arm": ""}


@pytest.fixture
def counted(demo_server, client):
    """(before, after) what was scraped around one stream, one answer, and requests that fail."""
    client.completions.create(model="weighted", prompt="upper: stone ->", max_tokens=1)
    before = scraped(demo_server)
    chunks = list(
        client.chat.completions.create(
            model="weighted",
            messages=[{"role": "user", "content": "upper: stone ->"}],
            max_tokens=6,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
    )
    answer = client.completions.create(model="weighted", prompt="upper: stone ->", max_tokens=3)
    for number in range(20):
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model=f"weighted{number}", prompt="x", max_tokens=1)
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="weighted", prompt="x", max_tokens=-1)
    after = scraped(demo_server)
    return before, after, chunks[-1].usage, answer.usage


def test_requests_are_counted_once_and_foreign_names_never(counted):
    before, after, stream, answer = counted

    def more(name: str, **labels: str) -> float:
        return total(after, name, **labels) - total(before, name, **labels)

    assert more("vllm_merge_requests_total", **ASKED, outcome="ok") == 2
    assert more("vllm_merge_requests_total", **ASKED, outcome="rejected") == 1
    assert more("vllm_merge_requests_total") == 3
    assert more("vllm_merge_completion_tokens_total", **ASKED) == stream.completion_tokens + answer.completion_tokens
    assert more("vllm_merge_prompt_tokens_total", **ASKED) == stream.prompt_tokens + answer.prompt_tokens
    assert more("vllm_merge_time_to_first_token_seconds_count", **ASKED) == 1
    assert 1 <= more("vllm_merge_inter_token_seconds_count", **ASKED) <= stream.completion_tokens
    assert more("vllm_merge_request_seconds_count", **ASKED) == 2
    recipes = {dict(key[1:])["recipe"] for key in after if key[0] == "vllm_merge_requests_total"}
    assert not [name for name in recipes if name.startswith("weighted") and name != "weighted"]


def test_the_workers_numbers_are_there(counted, demo_server):
    _, after, *_ = counted
    place = {"engine": "0", "rank": "0"}
    assert total(after, "vllm_merge_worker_up", **place) == 1
    assert total(after, "vllm_merge_merges_total", **place, recipe="weighted", outcome="done") >= 1
    assert total(after, "vllm_merge_merge_seconds_count", **place) == total(
        after, "vllm_merge_merges_total", outcome="done"
    )
    for stage in ("queue", "read", "merge", "factors", "place"):
        assert total(after, "vllm_merge_stage_seconds_total", **place, stage=stage) > 0, stage
    assert total(after, "vllm_merge_tier_bytes", **place, tier="cache") > 0
    assert total(after, "vllm_merge_tier_artifacts", **place, tier="cache") > 0
    assert total(after, "vllm_merge_artifact_lookups_total", **place, tier="merge") > 0
    assert total(after, "vllm_merge_source_lookups_total", **place, found="file") > 0
    assert 0 < total(after, "vllm_merge_slots_used", **place) <= total(after, "vllm_merge_slots", **place) == 4
    assert total(after, "vllm_merge_queue_limit", **place) == 16
    assert total(after, "vllm_merge_recipe_failed", recipe="weighted") == 0


def test_every_metric_of_the_table_is_there_and_no_other(counted):
    _, after, *_ = counted
    ends = ("_bucket", "_sum", "_count", "_created")
    found = {key[0] for key in after if key[0].startswith("vllm_merge_")}
    plain = {next((name.removesuffix(end) for end in ends if name.endswith(end)), name) for name in found}
    plain = {name if name in METRICS else f"{name}_total" for name in plain}
    assert plain <= set(METRICS)
    rare = {
        "vllm_merge_fallbacks_total",
        "vllm_merge_shadows_total",
        "vllm_merge_wait_seconds",
    }  # have labels, and nothing to say before they happen
    assert set(METRICS) - plain <= rare
    assert any(key[0].startswith("vllm:") for key in after), "vLLM's own are still there"
    assert metrics_scrape.PATH == "/metrics"
