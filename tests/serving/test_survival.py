# SPDX-License-Identifier: Apache-2.0
"""A server that files, slots, evictions, failing recipes and a frozen API process cannot kill or confuse."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import openai
import pytest

from tests.conftest import API_KEY, DEMO, alive, processes_of

PROMPT = "reverse: stone ->"


def client_of(server, key: str = API_KEY) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=120)


class Answer:
    """A greedy answer and its tokens' log-probabilities, by which artifacts that say the same are told apart."""

    def __init__(self, completion):
        self.text = completion.choices[0].text
        self.logprobs = completion.choices[0].logprobs.token_logprobs

    def __eq__(self, other) -> bool:
        return self.text == other.text and self.logprobs == pytest.approx(other.logprobs, abs=1e-3)


def options(model: str, tokens: int) -> dict:
    extra = {"ignore_eos": True}
    return {
        "model": model,
        "prompt": PROMPT,
        "max_tokens": tokens,
        "temperature": 0,
        "logprobs": 0,
        "extra_body": extra,
    }


def answer(client: openai.OpenAI, model: str, tokens: int = 12) -> Answer:
    completion = client.completions.create(**options(model, tokens))
    assert completion.model.startswith(f"{model}@")
    return Answer(completion)


def all_different(answers: list[Answer]) -> bool:
    return not any(a == b for i, a in enumerate(answers) for b in answers[:i])


def state_of(client: openai.OpenAI, name: str) -> dict:
    rows = client.get("/merge/recipes", cast_to=dict)["data"]
    return next(row for row in rows if row["name"] == name)


async def ask_all(server, models: list[str], tokens: int = 12) -> list[Answer]:
    """One request for each model, all at once."""
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=API_KEY, max_retries=0, timeout=240) as client:
        calls = (client.completions.create(**options(model, tokens)) for model in models)
        return [Answer(completion) for completion in await asyncio.gather(*calls)]


def test_no_merge_without_the_key(small_server):
    with pytest.raises(openai.AuthenticationError):
        answer(client_of(small_server, "wrong"), "alone")
    for path in ("/pooling", "/score", "/nonsense"):  # which vLLM's key check does not cover
        with contextlib.suppress(urllib.error.HTTPError):
            body = json.dumps({"model": "alone", "prompt": "a"}).encode()
            request = urllib.request.Request(small_server.url + path, body, {"Content-Type": "application/json"})
            urllib.request.urlopen(request, timeout=30)
    client = client_of(small_server)
    assert state_of(client, "alone")["state"] == "cold"
    answer(client, "alone")
    assert state_of(client, "alone")["state"] == "ready"


def test_a_merge_goes_on_while_the_api_process_is_stopped(small_server, control):
    api = processes_of(small_server)["api"]
    answers: list[Answer] = []
    asking = threading.Thread(target=lambda: answers.append(answer(client_of(small_server), "slow")))
    asking.start()
    deadline = time.monotonic() + 30
    while not (merging := [m for m in control.call("status")["merging"] if m["status"] == "merging"]):
        assert time.monotonic() < deadline, "the merge never began"
        time.sleep(0.005)
    os.kill(api, signal.SIGSTOP)
    try:
        assert merging[0]["name"].startswith("slow@")
        assert not any(a["digest"] == merging[0]["digest"] for a in control.call("status")["artifacts"]), "too quick"
        deadline = time.monotonic() + 60
        while not any(a["digest"] == merging[0]["digest"] for a in control.call("status")["artifacts"]):
            assert time.monotonic() < deadline, "the merge stopped with the API process"
            time.sleep(0.02)
        assert Path(f"/proc/{api}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T", "the API process is stopped"
    finally:
        os.kill(api, signal.SIGCONT)
    asking.join(60)
    assert len(answers) == 1


def test_fifty_adapters_while_others_hold_every_slot(small_server):
    client = client_of(small_server)
    alone = {name: answer(client, name) for name in ("a0", "a25", "a49")}
    long = [client.completions.create(**options(name, 150), stream=True) for name in ("m0", "m1")]
    first = [next(iter(stream)) for stream in long]  # both slots are taken now
    assert all(chunk.model[:2] in ("m0", "m1") for chunk in first)
    answers = asyncio.run(ask_all(small_server, [f"a{i}" for i in range(50)]))
    assert {name: answers[int(name[1:])] for name in alone} == alone
    assert all(sum(1 for _ in stream) > 100 for stream in long)
    assert all_different(list(alone.values())), "every adapter answered for itself"


def test_a_recipe_that_fails_says_why_and_the_server_goes_on(small_server):
    client = client_of(small_server)
    before = answer(client, "m0")
    with pytest.raises(openai.InternalServerError, match=r"`high` cannot be served.*--max-lora-rank 64") as high:
        answer(client, "high")
    assert high.value.response.headers["x-should-retry"] == "false"
    shutil.rmtree(small_server.files / "doomed")
    with pytest.raises(openai.InternalServerError, match=r"`gone` cannot be served.*doomed"):
        answer(client, "gone")
    assert state_of(client, "gone")["state"] == "failed"
    with pytest.raises(openai.InternalServerError, match=r"`gone` cannot be served.*doomed"):
        client.completions.create(model="gone", prompt=PROMPT, max_tokens=2, stream=True)
    assert answer(client, "m0") == before


def test_a_hundred_queued_requests_survive_the_loss_of_every_file_and_tier(small_server, control):
    """Runs last: it destroys the server's files."""
    client = client_of(small_server)
    names = [f"m{i}" for i in range(6)]
    right = {name: answer(client, name, 24) for name in names}
    assert all_different(list(right.values()))
    time.sleep(3)  # the leases of the requests above have ended
    digests = [state_of(client, name)["digest"] for name in names]
    assert all(control.call("evict", digest=digest)["evicted"] for digest in digests)

    models = [names[i % 6] for i in range(100)]

    async def destroy_while_they_run() -> list[Answer]:
        running = asyncio.create_task(ask_all(small_server, models, tokens=24))
        while sum(a["leases"] for a in control.call("status")["artifacts"] if a["digest"] in digests) < 6:
            assert not running.done()
            await asyncio.sleep(0.01)
        shutil.rmtree(small_server.files)
        for path in small_server.runtime.iterdir():
            path.unlink()
        assert not running.done()
        assert not any(control.call("evict", digest=digest)["evicted"] for digest in digests), "they are leased"
        while not running.done():
            for digest in digests:  # from here on each goes as soon as its last request has ended
                control.call("evict", digest=digest)
            await asyncio.sleep(0.005)
        return await running

    answers = asyncio.run(destroy_while_they_run())
    assert [a == right[m] for a, m in zip(answers, models, strict=True)] == [True] * 100
    assert small_server.answers()
    assert alive(small_server.process.pid)
    time.sleep(3)
    for digest in digests:
        control.call("evict", digest=digest)
    assert not [a for a in control.call("status")["artifacts"] if a["digest"] in digests], "nothing is left of them"
    for name in names:
        with pytest.raises(openai.InternalServerError, match="cannot be served"):
            answer(client, name, 24)
    base = client.completions.create(model=str(DEMO / "model"), prompt=PROMPT, max_tokens=4)
    assert base.choices[0].text
    assert small_server.answers()
