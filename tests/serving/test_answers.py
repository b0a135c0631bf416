# SPDX-License-Identifier: Apache-2.0
"""What is noted of an answer as it goes by: every message is the application's own, only the clock is not read."""

import asyncio
import json
from types import SimpleNamespace

import pytest

from vllm_merge.serving import compat
from vllm_merge.serving.requests import outcome
from vllm_merge.serving.requests.answers import AnswerFacts, Observed, subscribe


def start(status=200, kind="application/json"):
    return {"type": "http.response.start", "status": status, "headers": [(b"content-type", kind.encode())]}


def body(content, more=False):
    return {"type": "http.response.body", "body": content, "more_body": more}


def event(document) -> bytes:
    return b"data: " + (document if isinstance(document, bytes) else json.dumps(document).encode()) + b"\n\n"


def chunk(text):
    return event({"object": "text_completion", "choices": [{"index": 0, "text": text, "finish_reason": None}]})


def observe(messages, result=None) -> AnswerFacts:
    """The facts of an answer that consists of these messages; what subscribers got is the same, once."""
    told, passed = [], []

    async def send(message):
        passed.append(message)

    async def talk():
        observed = Observed(AnswerFacts("n", "recipe", "", "n", "/v1/completions", started=0.0, wall=0.0), send)
        for message in messages:
            await observed.send(message)
        observed.end(result or outcome.Outcome())

    unsubscribe = subscribe(told.append)
    try:
        asyncio.run(talk())
    finally:
        unsubscribe()
    assert passed == messages
    assert len(told) == 1
    return told[0]


@pytest.mark.parametrize("usage", [(7, 5), None])
def test_tokens_are_those_of_the_answer_or_else_of_the_engine(usage):
    document = {"choices": [{"text": 'it says "usage": {"prompt_tokens": 99}', "finish_reason": "stop"}]}
    if usage:
        document["usage"] = {"prompt_tokens": 7, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 3}}
    facts = observe(
        [start(), body(json.dumps(document).encode())],
        outcome.Outcome(label="n@1", prompt_tokens=70, completion_tokens=50, finish="stop"),
    )
    assert (facts.prompt_tokens, facts.completion_tokens) == (usage or (70, 50))
    assert (facts.label, facts.finish, facts.status, facts.error) == ("n@1", "stop", 200, None)
    assert facts.first_token is None
    assert not facts.streaming


def test_other_routes_call_their_tokens_otherwise():
    facts = observe([start(), body(b'{"usage": {"input_tokens": 3, "output_tokens": 4}}')])
    assert (facts.prompt_tokens, facts.completion_tokens) == (3, 4)


def test_an_answer_longer_than_what_is_kept_still_tells_its_usage():
    document = {"choices": [{"text": "x" * 500_000}], "usage": {"prompt_tokens": 1, "completion_tokens": 9}}
    whole = json.dumps(document).encode()
    pieces = [body(whole[at : at + 30_000], more=True) for at in range(0, len(whole), 30_000)]
    assert observe([start(), *pieces, body(b"")]).completion_tokens == 9


def test_a_stream_counts_from_its_first_content_and_knows_no_tokens_by_chunks():
    role = event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
    texts = [event({"choices": [{"delta": {"content": c}}]}) for c in ("a", '"quoted"', "c d e f")]
    end = event({"choices": [{"delta": {}, "finish_reason": "stop"}]})
    messages = [start(kind="text/event-stream; charset=utf-8")]
    messages += [body(piece, more=True) for piece in (role, *texts, end, b"data: [DONE]\n\n")]
    facts = observe([*messages, body(b"")], outcome.Outcome(label="n@1", completion_tokens=6, finish="stop"))
    assert facts.streaming
    assert facts.first_token is not None
    assert facts.first_token > 0
    assert len(facts.gaps) == 2, "between three pieces that carry content; neither the role nor the end counts"
    assert (facts.completion_tokens, facts.error) == (6, None)


def test_usage_at_the_end_of_a_stream_wins():
    usage = event({"choices": [], "usage": {"prompt_tokens": 2, "completion_tokens": 3}})
    messages = [start(kind="text/event-stream"), body(chunk("a"), True), body(usage, True), body(b"data: [DONE]\n\n")]
    facts = observe(messages, outcome.Outcome(completion_tokens=99))
    assert (facts.prompt_tokens, facts.completion_tokens) == (2, 3)


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([start(400), body(b'{"error": {"message": "m", "type": "BadRequestError"}}')], "BadRequestError"),
        ([start(500), body(b"no JSON")], "http_500"),
        ([start(kind="text/event-stream"), body(chunk("a"), True)], "client_left"),
        ([], "client_left"),
        (
            [
                start(kind="text/event-stream"),
                body(chunk("a"), True),
                body(event({"error": {"message": "m"}}), True),
                body(b"data: [DONE]\n\n"),
            ],
            "stream_error",
        ),
    ],
)
def test_what_went_wrong_is_one_word(messages, error):
    assert observe(messages).error == error


def test_a_subscriber_that_fails_takes_nobody_with_it(caplog):
    def broken(facts):
        raise RuntimeError("no room")

    unsubscribe = subscribe(broken)
    try:
        assert observe([start(), body(b"{}")]).status == 200
    finally:
        unsubscribe()
    assert "no room" in caplog.text


def test_the_engine_s_outputs_are_counted_for_leased_and_other_requests():
    def output(tokens, finish=None, prompt=(1, 2, 3)):
        return SimpleNamespace(
            prompt_token_ids=list(prompt),
            outputs=[SimpleNamespace(token_ids=list(range(tokens)), finish_reason=finish)],
        )

    class Engine:
        async def generate(self, prompt, lora_request=None):
            yield output(1)
            yield output(4, "length")

        async def encode(self, prompt, lora_request=None):
            yield SimpleNamespace(prompt_token_ids=[1, 2], outputs=object())

    engine = Engine()
    compat.wrap_engine(engine, lambda request: None, outcome.counter)

    async def talk():
        result = outcome.begin()
        for _ in range(2):  # two prompts in one request
            async for _ in engine.generate("p"):
                pass
        async for _ in engine.encode("p"):
            pass
        return result

    result = asyncio.run(talk())
    assert (result.prompt_tokens, result.completion_tokens, result.finish) == (8, 10, "length")


def test_without_a_request_of_ours_nothing_is_counted():
    assert outcome.counter() is None
