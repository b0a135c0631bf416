# SPDX-License-Identifier: Apache-2.0
"""A real server with everything full: more adapters than the cache, host memory and vLLM's own cache of 64 hold, a disk that
keeps all, one place in the queue, and an admin token.
"""

import asyncio
import json
import shutil
import sys
import time
import urllib.error
import urllib.request

import openai
import pytest
import torch
import yaml

from tests.conftest import DEMO, servers
from vllm_merge.adapters.peft import read_adapter
from vllm_merge.serving.memory.slots import flat_copy

TOKEN = "admin"
PROMPT = "upper: stone ->"
SOURCE = "double"  # the smallest adapter
COUNT = 70
CACHE, HOST = 24, 10  # artifacts that each tier holds
STEPS = 40  # merges that come before that of `long`: hundreds of answers take less
SIZE = flat_copy(
    {module: (pair.A, pair.B) for module, pair in read_adapter(DEMO / "adapters" / SOURCE).factors.items()},
    torch.device("cpu"),
    torch.float32,
)[0].nbytes


@pytest.fixture(scope="module")
def tight_server(tmp_path_factory):
    """Adapters a0 … a69 are one adapter at 70 alphas. Recipes take a second or so to merge, and say what happens meanwhile;
    `long` goes on with a chain of others, and takes as long as all of them.
    """
    files = tmp_path_factory.mktemp("tight")
    for i in range(COUNT):
        shutil.copytree(DEMO / "adapters" / SOURCE, files / f"a{i}")
        path = files / f"a{i}" / "adapter_config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps({**config, "lora_alpha": config["lora_alpha"] * (0.51 + i / 60)}))
    many = [{"adapter": f"a{i}"} for i in range(COUNT)]

    def slow(last: int, **more) -> dict:
        return {"merge_method": "ties", "space": "delta", "adapters": many[:last], "load": "lazy", "rank": 4, **more}

    def after(recipe: str, last: int, **more) -> dict:
        found = slow(last, **more)
        return {**found, "adapters": [{"adapter": recipe}, *found["adapters"]]}

    document = {
        "version": 1,
        "adapters": {f"a{i}": {"path": f"./a{i}"} for i in range(COUNT)},
        "recipes": {
            "wait0": slow(COUNT),
            "wait1": slow(COUNT - 1),
            "wait2": slow(COUNT - 5),
            "strict": slow(COUNT - 2, on_miss="reject"),
            "easy": slow(COUNT - 3, on_miss="fallback", fallback="a0"),
            "based": slow(COUNT - 4, on_miss="fallback", fallback="base"),
            "step0": slow(COUNT),
            **{f"step{i}": after(f"step{i - 1}", COUNT) for i in range(1, STEPS)},
            "long": after(f"step{STEPS - 1}", COUNT, on_miss="fallback", fallback="a0"),
        },
    }
    (files / "recipes.yaml").write_text(yaml.safe_dump(document))
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(DEMO / "model")]
    options = ["--enable-lora", "--max-loras", "2", "--max-lora-rank", "8", "--max-cpu-loras", "64"]
    memory = ["--kv-cache-memory-bytes", str(64 << 20)]
    environment = {
        "VLLM_MERGE_CONFIG": str(files / "recipes.yaml"),
        "VLLM_MERGE_CACHE_BYTES": str(CACHE * SIZE + 1024),
        "VLLM_MERGE_HOST_BYTES": str(HOST * (SIZE + 256)),
        "VLLM_MERGE_DISK": f"file://{files}/merges",
        "VLLM_MERGE_QUEUE": "1",
        "VLLM_MERGE_ADMIN_TOKEN": TOKEN,
    }
    with servers.running([*command, *options, *memory], environment) as server:
        server.files = files
        yield server


@pytest.fixture
def client(tight_server):
    with openai.OpenAI(base_url=f"{tight_server.url}/v1", api_key="none", max_retries=5, timeout=120) as client:
        yield client


def answer(client, model: str) -> list[float]:
    """The log-probabilities of a greedy answer, by which artifacts are told apart."""
    extra = {"ignore_eos": True}
    completion = client.completions.create(
        model=model, prompt=PROMPT, max_tokens=4, temperature=0, logprobs=0, extra_body=extra
    )
    return completion.choices[0].logprobs.token_logprobs


def worker(server) -> dict:
    with urllib.request.urlopen(f"{server.url}/v1/merge/artifacts") as reply:
        (facts,) = json.load(reply)["data"]
    return facts


def admin(server, method: str, path: str, token: str = TOKEN) -> tuple[int, dict]:
    headers = {"x-vllm-merge-admin-token": token}
    request = urllib.request.Request(f"{server.url}/v1/merge/{path}", method=method, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_everything_full_and_nothing_is_merged_twice(tight_server, client):
    first = [answer(client, f"a{i}") for i in range(COUNT)]
    assert len({tuple(values) for values in first}) == COUNT, "every adapter answered for itself"
    facts = worker(tight_server)
    assert facts["served_from"]["merge"] == COUNT
    assert CACHE - 1 <= len(facts["artifacts"]) <= CACHE
    assert facts["bytes"] + facts["others_bytes"] <= facts["budget_bytes"]
    assert facts["others_bytes"] < 1024, "vLLM, which has registered 64 adapters, keeps no tensor of ours"
    assert len(facts["slots"]) == 2
    assert len(facts["host"]["artifacts"]) == HOST
    assert facts["host"]["bytes"] <= facts["host"]["budget_bytes"]
    again = [answer(client, f"a{i}") for i in range(COUNT)]
    assert all(one == pytest.approx(other, abs=1e-5) for one, other in zip(again, first, strict=True))
    served = worker(tight_server)["served_from"]
    assert served["merge"] == COUNT
    assert served["disk"] > 0
    assert worker(tight_server)["bytes"] <= facts["budget_bytes"]
    assert len(list((tight_server.files / "merges").iterdir())) == COUNT


def test_a_damaged_entry_on_disk_is_merged_anew(tight_server, client):
    right = answer(client, "a0")
    for i in range(1, CACHE + HOST + 5):  # a0 is now on disk alone
        answer(client, f"a{i}")
    names = {
        row["name"]: row for row in json.load(urllib.request.urlopen(f"{tight_server.url}/v1/merge/recipes"))["data"]
    }
    weights = tight_server.files / "merges" / names["a0"]["digest"] / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"oops")
    before = worker(tight_server)["served_from"]["merge"]
    assert answer(client, "a0") == pytest.approx(right, abs=1e-5)
    assert worker(tight_server)["served_from"]["merge"] == before + 1
    assert "is damaged and is removed" in tight_server.tail(100_000)


def test_pins_stay_and_admin_routes_need_the_token(tight_server, client):
    assert admin(tight_server, "POST", "artifacts/a1/pin", "wrong")[0] == 403
    assert admin(tight_server, "POST", "artifacts/a1/pin")[1]["pinned"]
    assert admin(tight_server, "POST", "artifacts/nobody/pin")[0] == 404
    for i in range(2, 2 + CACHE):
        answer(client, f"a{i}")
    (row,) = [row for row in worker(tight_server)["artifacts"] if row["name"].startswith("a1@")]
    assert row["pinned"]
    time.sleep(2.5)  # its leases have ended
    assert not admin(tight_server, "POST", "artifacts/a1/evict")[1]["evicted"]
    assert admin(tight_server, "POST", "artifacts/a1/unpin")[1]["unpinned"]
    assert admin(tight_server, "POST", "artifacts/a1/evict")[1]["evicted"]
    assert admin(tight_server, "POST", "artifacts/a1/warm")[1]["tier"] == "host"


def test_who_answers_while_a_merge_runs(tight_server, client):
    a0 = answer(client, "a0")
    raw = client.completions.with_raw_response
    options = {"prompt": PROMPT, "max_tokens": 4, "temperature": 0, "logprobs": 0, "extra_body": {"ignore_eos": True}}
    long = raw.create(model="long", **options)
    assert long.headers["x-vllm-merge-artifact"].startswith("a0@")
    assert long.headers["x-vllm-merge-fallback"].startswith("long@")
    assert long.headers["x-vllm-merge-name"] == "long"
    assert long.parse().choices[0].logprobs.token_logprobs == pytest.approx(a0, abs=1e-5)
    based = raw.create(model="based", **options)
    assert based.headers["x-vllm-merge-artifact"] == based.parse().model == str(DEMO / "model")
    with pytest.raises(openai.InternalServerError, match="is being merged") as rejected:
        client.with_options(max_retries=0).completions.create(model="strict", **options)
    assert rejected.value.status_code == 503
    assert int(rejected.value.response.headers["retry-after"]) >= 1
    (running,) = [merge for merge in worker(tight_server)["merging"] if merge["status"] == "merging"]
    assert running["name"].startswith("long@"), "nobody waited for the merge"
    for name in ("long", "based", "strict"):  # one of the last two was refused by the queue of one
        admin(tight_server, "DELETE", f"merges/{name}")


def test_what_stood_in_is_relieved_by_what_was_merged(client):
    deadline = time.monotonic() + 120
    raw = client.completions.with_raw_response
    while "x-vllm-merge-fallback" in (easy := raw.create(model="easy", prompt=PROMPT, max_tokens=2)).headers:
        assert easy.headers["x-vllm-merge-artifact"].startswith("a0@")
        assert time.monotonic() < deadline, "the merge did not go on"
        time.sleep(0.1)
    assert easy.headers["x-vllm-merge-artifact"].startswith("easy@")


def test_a_full_queue_says_when_and_a_cancelled_merge_frees_the_worker(tight_server):
    async def scenario():
        async with openai.AsyncOpenAI(
            base_url=f"{tight_server.url}/v1", api_key="none", max_retries=0, timeout=240
        ) as many:

            async def ask(model):
                return await many.completions.create(model=model, prompt=PROMPT, max_tokens=2, temperature=0)

            async def merging(count):
                deadline = time.monotonic() + 30
                while len(found := (await asyncio.to_thread(worker, tight_server))["merging"]) != count:
                    assert time.monotonic() < deadline, found
                    await asyncio.sleep(0.02)

            await merging(0)
            running = asyncio.create_task(ask("wait0"))
            await merging(1)
            waiting = asyncio.create_task(ask("wait1"))
            await merging(2)
            with pytest.raises(openai.InternalServerError, match="1 merges are waiting already") as full:
                await ask("wait2")
            assert full.value.status_code == 503
            assert int(full.value.response.headers["retry-after"]) >= 1
            for name, task in (("wait1", waiting), ("wait0", running)):
                status, reply = await asyncio.to_thread(admin, tight_server, "DELETE", f"merges/{name}")
                assert (status, reply["cancelled"]) == (200, True)
                with pytest.raises(openai.InternalServerError, match="was cancelled") as cancelled:
                    await task
                assert cancelled.value.status_code == 503
            await merging(0)
            assert (await ask("a3")).choices[0].text
            assert (await asyncio.to_thread(admin, tight_server, "DELETE", "merges/wait0"))[0] == 404

    asyncio.run(scenario())
    assert tight_server.answers()
