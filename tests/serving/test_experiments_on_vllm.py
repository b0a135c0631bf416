# SPDX-License-Identifier: Apache-2.0
"""An experiment on a real server that has hardly any room: three slots, a cache of eight artifacts, 50 other adapters. The last
test ends the server with SIGKILL.
"""

import asyncio
import json
import os
import shutil
import signal
import time
import urllib.request

import openai
import pytest
import torch
import yaml

from tests.conftest import DEMO, servers
from vllm_merge.adapters.peft import read_adapter
from vllm_merge.experiments.divergence import truncated_kl
from vllm_merge.experiments.pairs import agreement
from vllm_merge.experiments.store import Store
from vllm_merge.experiments.tickets import read_ticket, signing_key
from vllm_merge.serving.memory.slots import flat_copy

SOURCE = "double"  # the smallest adapter
OTHERS = 50
KEPT = 8  # artifacts that the cache holds
USERS = [f"user-{i}" for i in range(16)]
PROMPT = "upper: stone ->"
WAIT_SECONDS = 120
SIZE = flat_copy(
    {module: (pair.A, pair.B) for module, pair in read_adapter(DEMO / "adapters" / SOURCE).factors.items()},
    torch.device("cpu"),
    torch.float32,
)[0].nbytes


@pytest.fixture(scope="module")
def ab_server(tmp_path_factory):
    """Adapters a0 … a51 are one adapter at 52 alphas; the arms of `ab` are a50, a51 and the base: with one slot for all others,
    every slot there is."""
    files = tmp_path_factory.mktemp("ab")
    names = [f"a{i}" for i in range(OTHERS + 2)]
    for i, name in enumerate(names):
        shutil.copytree(DEMO / "adapters" / SOURCE, files / name)
        path = files / name / "adapter_config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps({**config, "lora_alpha": config["lora_alpha"] * (0.51 + i / 60)}))
    document = {
        "version": 1,
        "adapters": {name: {"path": f"./{name}"} for name in names},
        "experiments": {
            "ab": {"arms": {"a50": 2, "a51": 2, "base": 1}, "unit": "user"},
            "compared": {"arms": {"a50": 1, "a51": 0, "base": 0}, "shadow": {"share": 1, "arms": ["a50", "base"]}},
        },
    }
    (files / "recipes.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    command = servers.merge_serve(DEMO / "model", files / "recipes.yaml", "--max-loras", "3", "--max-lora-rank", "8")
    environment = {
        "VLLM_MERGE_CACHE_BYTES": str(KEPT * SIZE + 1024),
        "VLLM_MERGE_STORE": str(files / "store.sqlite"),
        "VLLM_MERGE_SIGNING_KEY": "a key of this test alone",
    }
    with servers.running(command, environment) as server:
        server.files = files
        yield server


@pytest.fixture
def key(monkeypatch):
    monkeypatch.setenv("VLLM_MERGE_SIGNING_KEY", "a key of this test alone")
    signing_key.cache_clear()
    yield
    signing_key.cache_clear()


def get(server, path):
    with urllib.request.urlopen(f"{server.url}/v1/merge/{path}", timeout=60) as reply:
        return json.load(reply)


async def answer(client, model, user=openai.NOT_GIVEN, **more):
    reply = await client.completions.with_raw_response.create(
        model=model, prompt=PROMPT, max_tokens=8, temperature=0, user=user, **more
    )
    return reply.headers, reply.parse()


def test_with_every_slot_in_use_and_50_other_adapters_nobody_starves(ab_server):
    async def scenario():
        async with openai.AsyncOpenAI(
            base_url=f"{ab_server.url}/v1", api_key="none", max_retries=0, timeout=WAIT_SECONDS
        ) as client:
            first = {user: (await answer(client, "ab", user))[0]["x-vllm-merge-arm"] for user in USERS}
            assert set(first.values()) == {"a50", "a51", "base"}
            done = asyncio.Event()
            texts = {}

            async def keep_asking(user):
                """The arms are in use for as long as the others come."""
                count = 0
                while not done.is_set() or count < 2:
                    headers, reply = await answer(client, "ab", user)
                    assert headers["x-vllm-merge-arm"] == first[user]
                    assert texts.setdefault(first[user], reply.choices[0].text) == reply.choices[0].text
                    count += 1
                return count

            asking = [asyncio.create_task(keep_asking(user)) for user in USERS]
            gate = asyncio.Semaphore(8)

            async def other(name):
                async with gate:
                    return await answer(client, name)

            try:
                replies = await asyncio.gather(*(other(f"a{i}") for i in range(OTHERS)))
            finally:
                done.set()
            counts = await asyncio.gather(*asking)
            assert [reply.model.partition("@")[0] for _, reply in replies] == [f"a{i}" for i in range(OTHERS)]
            assert all("x-vllm-merge-experiment" not in headers for headers, _ in replies)
            assert min(counts) >= 2

    asyncio.run(scenario())
    assert ab_server.answers(), "the engine lives"
    arms = {row["artifact"] for row in get(ab_server, "experiments")["data"][0]["arms"]} - {str(DEMO / "model")}
    (worker,) = get(ab_server, "artifacts")["data"]
    kept = {row["name"] for row in worker["artifacts"] if row["kept"]}
    assert arms <= kept, "arms never left memory"
    assert len(kept) <= KEPT


def test_the_openai_client_sees_the_arm_in_answers_streams_and_errors(ab_server, key):
    with openai.OpenAI(base_url=f"{ab_server.url}/v1", api_key="none", max_retries=0) as client:
        raw = client.completions.with_raw_response.create(model="ab", prompt=PROMPT, max_tokens=4, user="u")
        arm, reply = raw.headers["x-vllm-merge-arm"], raw.parse()
        assert reply.model == raw.headers["x-vllm-merge-artifact"]
        ticket = read_ticket(reply.id)
        assert ticket == read_ticket(raw.headers["x-vllm-merge-exposure"])
        assert (ticket.experiment, ticket.arm, ticket.version) == ("ab", arm, 1)
        with client.completions.with_streaming_response.create(
            model="ab", prompt=PROMPT, max_tokens=4, user="u", stream=True
        ) as stream:
            assert stream.headers["x-vllm-merge-arm"] == arm
            chunks = [json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: {")]
        assert {read_ticket(chunk["id"]).arm for chunk in chunks} == {arm}
        assert {chunk["model"] for chunk in chunks} == {reply.model}
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model="ab", prompt=PROMPT, max_tokens=-1, user="u")
        assert caught.value.response.headers["x-vllm-merge-arm"] == arm
        own = client.completions.with_raw_response.create(
            model="ab", prompt=PROMPT, max_tokens=1, user="u", extra_headers={"X-Request-Id": "mine"}
        )
        assert own.parse().id == "cmpl-mine"
        assert read_ticket(own.headers["x-vllm-merge-exposure"]).arm == arm
        assert "ab" in {model.id for model in client.models.list().data}


def test_a_second_arm_answers_the_same_request_and_the_comparison_is_right(ab_server, key):
    """Each figure against what a client finds out by itself: both answers, and prompt_logprobs of the answer under both models."""
    url = f"{ab_server.url}/v1"
    own = next(row["artifact"] for row in get(ab_server, "experiments/compared")["arms"] if row["arm"] == "a50")
    ask = {"prompt": PROMPT, "max_tokens": 6, "temperature": 0}
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        ids = {"return_token_ids": True}
        models = (own, str(DEMO / "model"))
        said = [client.completions.create(model=model, extra_body=ids, **ask).choices[0] for model in models]
        tokens = [choice.token_ids for choice in said]
        prompt, logs = said[0].prompt_token_ids, []
        for model in models:
            whole = {"model": model, "prompt": prompt + tokens[0], "max_tokens": 1, "prompt_logprobs": 20}
            (choice,) = client.post("/completions", body=whole, cast_to=dict)["choices"]
            rows = choice["prompt_logprobs"][len(prompt) :]
            logs.append([{int(t): v["logprob"] for t, v in row.items() if v["rank"] <= 20} for row in rows])
        exposures = {}
        for stream in (False, True):
            raw = client.completions.with_raw_response.create(model="compared", stream=stream, user="u", **ask)
            exposures[read_ticket(raw.headers["x-vllm-merge-exposure"]).exposure] = stream
            if stream:
                list(raw.parse())
        chat = {"messages": [{"role": "user", "content": "stone"}], "max_tokens": 6}
        said_in_chat = client.chat.completions.with_raw_response.create(model="compared", user="u", **chat)
        chatted = read_ticket(said_in_chat.headers["x-vllm-merge-exposure"]).exposure
    expected = [truncated_kl(p, q) for p, q in zip(*logs, strict=True)]
    deadline = time.monotonic() + WAIT_SECONDS
    store = Store.open(str(ab_server.files / "store.sqlite"), create=False)
    while True:
        with store.reading() as connection:
            found = connection.exec_driver_sql("SELECT * FROM pairs").mappings().all()
        if len(found) == len(exposures) + 1:
            break
        assert time.monotonic() < deadline, found
        time.sleep(0.1)
    store.close()
    assert {row["exposure"] for row in found} == exposures.keys() | {chatted}
    (of_chat,) = (row for row in found if row["exposure"] == chatted)
    assert (of_chat["outcome"], of_chat["tokens"]) == ("ok", said_in_chat.parse().usage.completion_tokens)
    assert of_chat["kl"] >= 0
    found = [row for row in found if row["exposure"] != chatted]
    for row in found:
        assert (row["outcome"], row["arm"], row["shadow"]) == ("ok", "a50", "base")
        assert (row["tokens"], row["shadow_tokens"]) == (len(tokens[0]), len(tokens[1]))
        assert (row["agreement"], bool(row["equal"])) == (pytest.approx(agreement(*tokens)), tokens[0] == tokens[1])
        assert row["positions"] == len(tokens[0])
        assert row["kl"] == pytest.approx(sum(one.kl for one in expected) / len(expected), rel=1e-2, abs=1e-5)
        missing = sum(one.missing for one in expected) / len(expected)
        assert row["missing"] == pytest.approx(missing, rel=1e-2, abs=1e-5)
        streamed = exposures[row["exposure"]]
        assert (row["first_token"] is not None, row["shadow_first_token"] is not None) == (streamed, streamed)
        assert row["shadow_seconds"] > 0
    assert found[0]["kl"] > 0
    (both,) = get(ab_server, "experiments/compared/report")["paired"]
    assert (both["control"], both["arm"], both["pairs"], both["dropped"]) == ("a50", "base", 3, {})


def test_exposures_say_what_was_measured_and_survive_a_sigkill_with_every_outcome(ab_server, key):
    with openai.OpenAI(base_url=f"{ab_server.url}/v1", api_key="none", max_retries=0) as client:
        expected = {}
        for number in range(12):
            stream = client.completions.create(
                model="ab", prompt=PROMPT, max_tokens=6, user="x", stream=number % 2 == 0
            )
            reply = list(stream)[-1] if number % 2 == 0 else stream
            expected[read_ticket(reply.id).exposure] = number % 2 == 0
            told = client.post("/merge/outcomes", body={"response_id": reply.id, "score": number}, cast_to=dict)
            assert told["recorded"] == 1
        deadline = time.monotonic() + WAIT_SECONDS
        while (seen := get(ab_server, "experiments")["exposures"])["waiting"] and time.monotonic() < deadline:
            time.sleep(0.1)
        assert seen["dropped"] == 0
    os.killpg(ab_server.process.pid, signal.SIGKILL)
    ab_server.process.wait()
    store = Store.open(str(ab_server.files / "store.sqlite"), create=False)
    with store.reading() as connection:
        rows = {row["id"]: row for row in connection.exec_driver_sql("SELECT * FROM exposures").mappings()}
        outcomes = connection.exec_driver_sql("SELECT exposure, value FROM outcomes").all()
    assert expected.keys() <= rows.keys()
    assert {exposure for exposure, _ in outcomes} == expected.keys()
    assert sorted(value for _, value in outcomes) == list(range(12))
    for exposure, streamed in expected.items():
        row = rows[exposure]
        assert (row["reason"], row["status"], row["error"]) == ("SPLIT", 200, "")
        assert (row["prompt_tokens"] > 0, 0 < row["completion_tokens"] <= 6) == (True, True)
        assert row["finish"] in ("stop", "length")
        assert (row["first_token"] is not None, bool(row["streaming"])) == (streamed, streamed)
        assert row["unit"] != "x"
        assert row["seconds"] > 0
