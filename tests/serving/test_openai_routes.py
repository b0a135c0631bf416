# SPDX-License-Identifier: Apache-2.0
"""Every route of vLLM that takes a model name, asked for a merge: the artifact is in the headers and the answer is the merged
model's, not the base's. (test_routes.py has completions, chat and responses, whole and streamed, answer by answer.)
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from typing import Any

import pytest
import yaml

from tests.conftest import CONFIG, DEMO, servers
from tests.serving.test_routes import recipes_of

BASE = str(DEMO / "model")
MERGE = "weighted"  # answers each of these rightly, as the base does not
PROMPT, ANSWER = "upper: ring ->", "RING"
WRONG = ["gnir", "ring", "moor"]


def post(
    server: Any, path: str, body: dict[str, Any], headers: dict[str, str] | None = None
) -> tuple[dict[str, Any], dict[str, str]]:
    """The answer and its headers."""
    content = json.dumps(body).encode()
    request = urllib.request.Request(
        server.url + path, content, {"Content-Type": "application/json", **(headers or {})}
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as reply:
            return json.load(reply), {name.lower(): value for name, value in reply.headers.items()}
    except urllib.error.HTTPError as error:
        pytest.fail(f"{path}: {error.code} {error.read().decode()[:500]}")


@pytest.fixture
def artifact(demo_server) -> str:
    return artifact_of(demo_server)


@pytest.fixture(scope="module")
def full_server():
    """The demo with what is off by default: calling tools, tokens in and out, and JSON without free white space."""
    structured = {"backend": "xgrammar", "disable_any_whitespace": True}
    tools = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--enable-scale-out")
    options = (
        *tools,
        "--structured-outputs-config",
        json.dumps(structured),
        "--max-loras",
        "4",
        "--max-lora-rank",
        "64",
    )
    with servers.running(servers.merge_serve(DEMO / "model", CONFIG, *options)) as server:
        yield server


@pytest.fixture(scope="module")
def pooling_server():
    """The demo's model as one that embeds."""
    options = ("--runner", "pooling", "--convert", "embed", "--max-loras", "4", "--max-lora-rank", "64")
    with servers.running(servers.merge_serve(DEMO / "model", CONFIG, *options)) as server:
        yield server


def artifact_of(server: Any) -> str:
    return recipes_of(server)[MERGE]["artifact"]


def asked_twice(server: Any, artifact: str, path: str, body: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the merge's answer, the base's), after a look at the headers of both."""
    merged, headers = post(server, path, {**body, "model": MERGE})
    assert headers["x-vllm-merge-artifact"] == artifact
    assert headers["x-vllm-merge-name"] == MERGE
    base, headers = post(server, path, {**body, "model": BASE})
    assert "x-vllm-merge-artifact" not in headers
    return merged, base


GREEDY = {"temperature": 0, "max_tokens": 8}
CHAT = {"messages": [{"role": "user", "content": PROMPT}], **GREEDY}


def test_completions_with_logprobs(demo_server, artifact):
    body = {"prompt": PROMPT, "logprobs": 3, "stop": ["\n"], **GREEDY}
    merged, base = asked_twice(demo_server, artifact, "/v1/completions", body)
    assert merged["model"] == artifact
    assert merged["choices"][0]["text"].strip() == ANSWER != base["choices"][0]["text"].strip()
    likely = merged["choices"][0]["logprobs"]
    assert len(likely["token_logprobs"]) == merged["usage"]["completion_tokens"]
    assert all(len(top) >= 3 for top in likely["top_logprobs"])
    assert likely["token_logprobs"][0] != pytest.approx(base["choices"][0]["logprobs"]["token_logprobs"][0], abs=1e-2)


def test_several_answers_to_several_prompts(demo_server, artifact):
    body = {
        "prompt": [PROMPT, "reverse: thumb ->"],
        "n": 2,
        "temperature": 0.01,
        "seed": 1,
        "max_tokens": 8,
        "stop": ["\n"],
    }
    merged, base = asked_twice(demo_server, artifact, "/v1/completions", body)
    assert [choice["text"].strip() for choice in merged["choices"]] == [ANSWER, ANSWER, "bmuht", "bmuht"]
    assert [choice["index"] for choice in merged["choices"]] == [0, 1, 2, 3]
    assert merged["choices"][0]["text"] != base["choices"][0]["text"]


def test_chat_with_logprobs_and_several_answers(demo_server, artifact):
    body = {**CHAT, "n": 3, "temperature": 0.01, "seed": 1, "logprobs": True, "top_logprobs": 2, "stop": ["\n"]}
    merged, base = asked_twice(demo_server, artifact, "/v1/chat/completions", body)
    assert [choice["message"]["content"].strip() for choice in merged["choices"]] == [ANSWER] * 3
    tokens = merged["choices"][2]["logprobs"]["content"]
    assert all(len(token["top_logprobs"]) == 2 for token in tokens)
    assert merged["choices"][0]["message"]["content"] != base["choices"][0]["message"]["content"]


def test_a_choice_among_words(demo_server, artifact):
    """Both must choose; the demo's model has not learned these words as one choice tells their tokens, so which is not asked."""
    words = [f" {word}" for word in (*WRONG, ANSWER)]
    body = {**CHAT, "structured_outputs": {"choice": words}, "logprobs": True}
    merged, base = asked_twice(demo_server, artifact, "/v1/chat/completions", body)
    said, scores = [], []
    for answer in (merged, base):
        choice = answer["choices"][0]
        said.append(choice["message"]["content"])
        scores.append([token["logprob"] for token in choice["logprobs"]["content"]])
    assert set(said) <= set(words)
    assert said[0] != said[1] or scores[0] != pytest.approx(scores[1], abs=1e-3), "the merge has chosen, not the base"


def test_responses(demo_server, artifact):
    body = {"input": PROMPT, "max_output_tokens": 8, "temperature": 0}
    merged, base = asked_twice(demo_server, artifact, "/v1/responses", body)
    said = [answer["output"][-1]["content"][0]["text"].strip().split("\n")[0] for answer in (merged, base)]
    assert said[0] == ANSWER != said[1]


def test_anthropic_messages(demo_server, artifact):
    body = {**CHAT, "stop_sequences": ["\n"]}
    merged, base = asked_twice(demo_server, artifact, "/v1/messages", body)
    assert merged["content"][0]["text"].strip() == ANSWER != base["content"][0]["text"].strip()
    assert merged["model"] == artifact


def test_many_chats_in_one_request(demo_server, artifact):
    more = [{"role": "user", "content": "reverse: thumb ->"}]
    body = {**CHAT, "messages": [CHAT["messages"], more], "stop": ["\n"]}
    merged, base = asked_twice(demo_server, artifact, "/v1/chat/completions/batch", body)
    assert [choice["message"]["content"].strip() for choice in merged["choices"]] == [ANSWER, "bmuht"]
    assert merged["choices"][0]["message"] != base["choices"][0]["message"]


def test_sagemakers_route(demo_server, artifact):
    """There the adapter is named by a header, which takes the place of the body's `model`."""
    header = {"X-Amzn-SageMaker-Adapter-Identifier": MERGE}
    merged, headers = post(demo_server, "/invocations", {**CHAT, "stop": ["\n"], "model": "knots-mean"}, header)
    assert merged["model"] == artifact == headers["x-vllm-merge-artifact"]
    assert headers["x-vllm-merge-name"] == MERGE
    assert merged["choices"][0]["message"]["content"].strip() == ANSWER


def test_tokenizing_for_a_name_needs_no_merge(demo_server):
    lazy = "knots-mean"
    before = recipes_of(demo_server)[lazy]["state"]
    names = (lazy, MERGE, "assistant", BASE)
    bodies = {"/tokenize": {"prompt": PROMPT}, "/detokenize": {"tokens": [5, 6, 7]}}
    for path, body in bodies.items():
        replies = [post(demo_server, path, {**body, "model": name})[0] for name in names]
        assert all(reply == replies[0] for reply in replies)
    assert recipes_of(demo_server)[lazy]["state"] == before


def test_counting_tokens_takes_our_names(demo_server):
    counts = [
        post(demo_server, "/v1/messages/count_tokens", {"messages": CHAT["messages"], "model": name})[0]["input_tokens"]
        for name in (MERGE, BASE)
    ]
    assert counts[0] == counts[1] > 0


# -- what is off by default -------------------------------------------------------------------------------------------------


SCHEMA = {
    "type": "object",
    "properties": {"word": {"type": "string", "enum": [*WRONG, ANSWER]}},
    "required": ["word"],
    "additionalProperties": False,
}


@pytest.mark.full
def test_json_of_a_schema(full_server):
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}
    body = {**CHAT, "max_tokens": 64, "response_format": form}
    merged, base = asked_twice(full_server, artifact_of(full_server), "/v1/chat/completions", body)
    for answer in (merged, base):
        assert json.loads(answer["choices"][0]["message"]["content"])["word"] in SCHEMA["properties"]["word"]["enum"]
    assert merged["model"] == artifact_of(full_server)


@pytest.mark.full
@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "say"}}], ids=["any", "named"]
)
def test_a_tool_is_called(full_server, choice):
    tool = {"type": "function", "function": {"name": "say", "description": "Say a word.", "parameters": SCHEMA}}
    body = {**CHAT, "max_tokens": 120, "tools": [tool], "tool_choice": choice, "logprobs": True}
    answers = asked_twice(full_server, artifact_of(full_server), "/v1/chat/completions", body)
    values = []
    for answer in answers:
        (call,) = answer["choices"][0]["message"]["tool_calls"]
        assert call["function"]["name"] == "say"
        json.loads(call["function"]["arguments"])  # raises if it is not JSON
        values.append([step["logprob"] for step in answer["choices"][0]["logprobs"]["content"]])
    assert answers[0]["model"] == artifact_of(full_server)
    assert values[0] != pytest.approx(values[1], abs=1e-3), "the merge's probabilities are not the base's"


@pytest.mark.full
def test_tokens_in_and_out(full_server):
    tokens = post(full_server, "/tokenize", {"model": MERGE, "prompt": PROMPT})[0]["tokens"]
    body = {"token_ids": tokens, "sampling_params": {"temperature": 0, "max_tokens": 8, "stop": ["\n"]}}
    merged, base = asked_twice(full_server, artifact_of(full_server), "/inference/v1/generate", body)
    ids = [answer["choices"][0]["token_ids"] for answer in (merged, base)]
    text = post(full_server, "/detokenize", {"model": MERGE, "tokens": ids[0]})[0]["prompt"]
    assert text.strip().split("\n")[0] == ANSWER
    assert ids[0] != ids[1]


@pytest.mark.full
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions/render", {"prompt": PROMPT}),
        ("/v1/chat/completions/render", CHAT),
        ("/v1/messages/count_tokens", {"messages": CHAT["messages"]}),
    ],
)
def test_what_only_renders_a_prompt_takes_our_names(full_server, path, body):
    replies = [post(full_server, path, {**body, "model": name})[0] for name in (MERGE, BASE)]
    assert all(replies)


# -- a pooling model --------------------------------------------------------------------------------------------------------


def embedding_of(answer: dict[str, Any]) -> list[float]:
    row = answer["data"][0]
    return row.get("embedding") or row["data"]


@pytest.mark.full
@pytest.mark.parametrize("path", ["/v1/embeddings", "/pooling", "/v2/embed"])
def test_embeddings(pooling_server, path):
    artifact = artifact_of(pooling_server)
    if path == "/v2/embed":
        body: dict[str, Any] = {"texts": [PROMPT], "embedding_types": ["float"]}
        merged, base = asked_twice(pooling_server, artifact, path, body)
        vectors = [answer["embeddings"]["float"][0] for answer in (merged, base)]
    else:
        merged, base = asked_twice(pooling_server, artifact, path, {"input": PROMPT})
        vectors = [embedding_of(answer) for answer in (merged, base)]
        assert merged["model"] == artifact
    assert len(vectors[0]) == len(vectors[1]) > 8
    assert vectors[0] != pytest.approx(vectors[1], abs=1e-3), "the merge is in it"
    again = asked_twice(pooling_server, artifact, "/v1/embeddings", {"input": [PROMPT, "another"]})[0]
    if path != "/v2/embed":
        assert embedding_of(again) == pytest.approx(vectors[0], abs=1e-5), "alone or beside others"


@pytest.mark.full
@pytest.mark.parametrize("path", ["/score", "/v1/score", "/rerank", "/v1/rerank", "/v2/rerank"])
def test_scores_and_ranks(pooling_server, path):
    texts = ["upper: ring -> RING", "add: 1 2 -> 3"]
    score = path.endswith("score")
    body = {"text_1": PROMPT, "text_2": texts} if score else {"query": PROMPT, "documents": texts}
    merged, base = asked_twice(pooling_server, artifact_of(pooling_server), path, body)
    found = [scores(answer, score) for answer in (merged, base)]
    assert len(found[0]) == 2
    assert found[0] != pytest.approx(found[1], abs=1e-4), "the merge is in it"


def scores(answer: dict[str, Any], score: bool) -> list[float]:
    if score:
        return [row["score"] for row in answer["data"]]
    return [row["relevance_score"] for row in sorted(answer["results"], key=lambda row: row["index"])]


# -- the batch runner -------------------------------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.server
def test_the_batch_runner_answers_for_every_name(tmp_path, prompts):
    """Recipe, alias, adapter and base, in one batch: each row says which artifact gave it, and merges give the right answers."""
    asked = [(name, prompt) for name in (MERGE, "assistant", "upper", BASE) for prompt in (PROMPT, "reverse: thumb ->")]
    lines = [
        {
            "custom_id": f"{number}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"model": name, **CHAT, "messages": [{"role": "user", "content": prompt}], "stop": ["\n"]},
        }
        for number, (name, prompt) in enumerate(asked)
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    files = ["-i", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl")]
    options = ["--enable-lora", "--max-loras", "4", "--max-lora-rank", "64", "--dtype", "float32", "--enforce-eager"]
    memory = ["--max-model-len", "256", "--max-num-seqs", "32", "--gpu-memory-utilization", "0.3"]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.run_batch", *files, "--model", BASE, *options, *memory]
    environment = {**os.environ, **servers.CPU_ENVIRONMENT, "VLLM_MERGE_CONFIG": str(CONFIG)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr[-3000:]
    rows = sorted((json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()), key=number_of)
    bodies = [row["response"]["body"] for row in rows]
    assert all(body is not None for body in bodies), [row["error"] for row in rows]
    named = [body["model"].partition("@")[0] for body in bodies]
    target = yaml.safe_load(CONFIG.read_text())["aliases"]["assistant"]
    assert named == [name if name != "assistant" else target for name, _ in asked]
    assert all("@" in body["model"] for body in bodies[:6]), "answers name the artifact"
    words = [body["choices"][0]["message"]["content"] for body in bodies]
    assert words[:2] != words[6:], "a merge is not the base"


def number_of(row: dict[str, Any]) -> int:
    return int(row["custom_id"])
