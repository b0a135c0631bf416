# SPDX-License-Identifier: Apache-2.0
"""What an arm leaves behind: an exposure, a span where somebody traces, and whether an answer was a refusal."""

import json

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from vllm_merge.experiments.assignment import Assignment
from vllm_merge.serving.experiments.experiments import Chosen
from vllm_merge.serving.experiments.exposures import exposure_of, headers_of, trace
from vllm_merge.serving.requests.answers import AnswerFacts
from vllm_merge.serving.requests.openings import CHARACTERS, Opening
from vllm_merge.serving.telemetry import tracing

SPLIT = Chosen(Assignment("ab", "two", "SPLIT"), 3, "two", "two@12", "0" * 32, "f" * 32, "user", "base")
HELD_OUT = Chosen(Assignment("ab", "one", "DEFAULT", "holdout"), 3, "one", "one@12", "1" * 32, "", "request", "base")


def facts(**more) -> AnswerFacts:
    return AnswerFacts("assistant", "experiment", "two@12", "two", "/v1/completions", 5.0, 1e9, **more)


def test_an_exposure_has_what_was_measured():
    gaps = [0.01] * 98 + [0.5, 0.9]
    found = exposure_of(
        facts(
            status=200,
            streaming=True,
            first_token=0.2,
            gaps=gaps,
            seconds=3.0,
            prompt_tokens=7,
            completion_tokens=101,
            finish="stop",
        ),
        SPLIT,
    )
    assert (found.id, found.at, found.experiment, found.version, found.arm) == ("0" * 32, 1e9, "ab", 3, "two")
    assert (found.artifact, found.reason, found.unit, found.unit_kind) == ("two@12", "SPLIT", "f" * 32, "user")
    assert (found.prompt_tokens, found.completion_tokens, found.finish, found.error) == (7, 101, "stop", "")
    assert (found.first_token, found.gap_p99, found.gap_max) == (0.2, 0.9, 0.9)
    assert found.gap_mean == pytest.approx(sum(gaps) / 100)
    assert found.counted
    assert not found.failed


def test_why_nobody_drew_lots_is_in_the_exposure_and_the_headers():
    found = exposure_of(facts(status=200), HELD_OUT)
    assert (found.reason, found.counted, found.gap_mean) == ("DEFAULT: holdout", False, None)
    assert headers_of(HELD_OUT, "t")["x-vllm-merge-cause"] == "holdout"
    assert "x-vllm-merge-cause" not in headers_of(SPLIT, "t")


@pytest.mark.parametrize(
    ("status", "tokens", "error", "kept"),
    [
        (400, None, "BadRequestError", False),
        (404, None, "NotFoundError", False),
        (400, 5, "BadRequestError", True),
        (503, None, "merge_unavailable", True),
        (500, None, "http_500", True),
        (0, None, "client_left", True),
    ],
)
def test_a_request_that_vllm_refuses_used_no_arm(status, tokens, error, kept):
    found = exposure_of(facts(status=status, prompt_tokens=tokens, error=error), SPLIT)
    assert (found is not None) is kept
    if found is not None:
        assert found.failed is (status >= 500)


@pytest.fixture
def spans(monkeypatch):
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(tracing, "_tracer", provider.get_tracer("test"))
    return exporter.get_finished_spans


def test_an_assignment_is_a_feature_flag_evaluation_in_the_trace(spans):
    trace(SPLIT, "assistant")
    trace(HELD_OUT, "assistant")
    first, second = spans()
    (event,) = first.events
    assert event.name == "feature_flag.evaluation"
    assert dict(event.attributes) == {
        "feature_flag.key": "ab",
        "feature_flag.result.variant": "two",
        "feature_flag.result.reason": "split",
        "feature_flag.context.id": "f" * 32,
        "feature_flag.provider.name": "vllm-merge",
        "feature_flag.version": "3",
        "feature_flag.set.id": "base",
    }
    assert first.attributes["gen_ai.request.model"] == "assistant"
    assert first.attributes["gen_ai.response.model"] == "two@12"
    assert second.events[0].attributes["feature_flag.context.id"] == HELD_OUT.exposure


def test_without_a_tracer_nothing_is_made(monkeypatch, spans):
    monkeypatch.setattr(tracing, "_tracer", None)
    trace(SPLIT, "assistant")
    assert spans() == ()


@pytest.mark.parametrize(
    ("text", "refuses"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I\u2019m sorry, I cannot do this.", True),
        ("\n\nI cannot assist with that request.", True),
        ("As an AI language model, I do not have opinions.", True),
        ("Unfortunately, I can not say.", True),
        ("I am sorry to hear that! Here is what you can do.", True),  # counted alike in every arm
        ("Sure! I can help.", False),
        ("The film 'I'm sorry' opens well.", False),
        ("", False),
    ],
)
@pytest.mark.parametrize("streamed", [False, True])
def test_an_answer_that_begins_like_a_refusal_is_one(text, refuses, streamed):
    opening = Opening()
    opening.look(b'{"choices":[{"delta":{"role":"assistant","content":""}}]}')
    pieces = list(text) if streamed else [text]
    for piece in pieces:
        key = {"delta": {"content": piece}} if streamed else {"message": {"role": "assistant", "content": piece}}
        opening.look(json.dumps({"choices": [{"index": 0, **key}]}).encode())
    assert opening.refuses is refuses


def test_only_the_beginning_of_an_answer_is_kept():
    opening = Opening()
    for _ in range(1000):
        opening.look(json.dumps({"choices": [{"text": "well " * 10}]}).encode())
    opening.look(json.dumps({"choices": [{"text": "I'm sorry"}]}).encode())
    assert not opening.refuses
    assert len(opening._text) < 2 * CHARACTERS


def test_a_text_that_is_cut_in_the_middle_of_a_character_is_read_as_far_as_it_goes():
    opening = Opening()
    opening.look(b'{"choices":[{"text":"I cannot \\u00')
    assert opening.refuses
