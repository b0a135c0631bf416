# SPDX-License-Identifier: Apache-2.0
"""The recipe file changes while the server runs: an alias moves, a wrong file changes nothing, vLLM's adapters take part."""

import json
import sys
import time
import urllib.request

import openai
import pytest
import yaml

from tests.conftest import DEMO, servers

PROMPT = "upper: stone ->"
MIX = [{"adapter": "given", "parameters": {"weight": 1.0}}, {"adapter": "reverse", "parameters": {"weight": 0.2}}]
FIRST = {
    "version": 1,
    "adapters": {"reverse": {"path": str(DEMO / "adapters" / "reverse")}},
    "recipes": {
        "a": {"merge_method": "task_arithmetic", "adapters": MIX},
        "b": {"merge_method": "linear", "adapters": MIX},
        "later": {"merge_method": "ties", "adapters": MIX, "load": "lazy"},
    },
    "aliases": {"assistant": "a"},
}


@pytest.fixture(scope="module")
def live_server(tmp_path_factory):
    """A server whose adapter `given` is vLLM's own (--lora-modules), and whose recipe file the tests rewrite."""
    config = tmp_path_factory.mktemp("live") / "recipes.yaml"
    config.write_text(yaml.safe_dump(FIRST))
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(DEMO / "model")]
    options = ["--enable-lora", "--max-loras", "4", "--max-lora-rank", "64"]
    modules = ["--lora-modules", f"given={DEMO / 'adapters' / 'upper'}"]
    environment = {"VLLM_MERGE_CONFIG": str(config), "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    with servers.running([*command, *options, *modules], environment) as server:
        server.config = config
        yield server


@pytest.fixture
def client(live_server):
    with openai.OpenAI(base_url=f"{live_server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def answered_by(client, model: str) -> str:
    return client.completions.create(model=model, prompt=PROMPT, max_tokens=8, temperature=0).model


def file_state(client) -> dict:
    return client.get("/merge/recipes", cast_to=dict)["file"]


def rewrite(server, client, document) -> dict:
    """Write the file and wait until the server has looked at it."""
    before = file_state(client)
    server.config.write_text(document if isinstance(document, str) else yaml.safe_dump(document))
    deadline = time.monotonic() + 30
    while file_state(client) == before:
        assert time.monotonic() < deadline, "the change was not seen"
        time.sleep(0.1)
    return file_state(client)


def test_eager_is_ready_before_health_and_lazy_at_its_first_request(client):
    def states() -> dict:
        return {row["name"]: row["state"] for row in client.get("/merge/recipes", cast_to=dict)["data"]}

    assert [states()[name] for name in ("a", "b", "assistant", "later")] == ["ready", "ready", "ready", "cold"]
    assert answered_by(client, "later").startswith("later@")
    assert states()["later"] == "ready"


def test_adapters_that_vllm_was_given_take_part_and_go_through_our_loader(live_server, client):
    assert answered_by(client, "given").startswith("given@")
    answer = client.completions.create(model="a", prompt=PROMPT, max_tokens=8, temperature=0, stop=["\n"])
    assert answer.model.startswith("a@")
    assert answer.choices[0].text.strip() == "STONE"


def test_an_alias_moves_and_a_stream_that_runs_keeps_its_artifact(live_server, client):
    a, b = answered_by(client, "a"), answered_by(client, "b")
    assert answered_by(client, "assistant") == a != b
    options = {"prompt": PROMPT, "max_tokens": 150, "temperature": 0, "extra_body": {"ignore_eos": True}}
    running = client.completions.create(model="assistant", stream=True, **options)
    first = next(running)
    state = rewrite(live_server, client, {**FIRST, "aliases": {"assistant": "b"}})
    assert state == {"generation": 2, "error": None}
    assert answered_by(client, "assistant") == b
    assert {chunk.model for chunk in running} == {first.model} == {a}


def test_a_wrong_file_changes_nothing_and_says_why(live_server, client):
    before = {model.id: model.root for model in client.models.list().data}
    wrong = yaml.safe_dump(FIRST).replace("task_arithmetic", "task_aritmetic")
    state = rewrite(live_server, client, wrong)
    assert state["generation"] == 2
    assert "recipes.yaml:" in state["error"]
    assert "did you mean 'task_arithmetic'?" in state["error"]
    assert {model.id: model.root for model in client.models.list().data} == before
    assert "is wrong; what was served before stays" in live_server.tail(20000)
    live_server.config.unlink()
    time.sleep(2.5)
    assert answered_by(client, "assistant") == before["assistant"]


def test_new_recipes_come_and_old_ones_go(live_server, client):
    document = json.loads(json.dumps(FIRST))
    document["recipes"]["c"] = document["recipes"].pop("b")
    state = rewrite(live_server, client, document)
    assert state == {"generation": 3, "error": None}
    assert answered_by(client, "c").startswith("c@")
    with pytest.raises(openai.NotFoundError):
        answered_by(client, "b")
    assert {"a", "c", "assistant", "given", "reverse"} <= {model.id for model in client.models.list().data}


def test_a_recipe_that_changes_under_its_alias_answers_anew_although_its_prefix_is_cached(live_server, client):
    prompt = " ".join(f"upper: stone{i} -> STONE{i}" for i in range(30))[:230]  # longer than a block of the cache

    def ask(**extra) -> tuple[str, list[float]]:
        """The model that answers, and the log-probabilities of its greedy answer."""
        options = {"temperature": 0, "max_tokens": 8, "logprobs": 0, "extra_body": {"ignore_eos": True, **extra}}
        completion = client.completions.create(model="assistant", prompt=prompt, **options)
        assert completion.usage.prompt_tokens > 150
        return completion.model, completion.choices[0].logprobs.token_logprobs

    def same(one: tuple[str, list[float]], other: tuple[str, list[float]]) -> bool:
        return one[0] == other[0] and one[1] == pytest.approx(other[1], abs=1e-4)

    def hits() -> float:
        text = urllib.request.urlopen(f"{live_server.url}/metrics").read().decode()
        lines = [line for line in text.splitlines() if line.startswith("vllm:prefix_cache_hits_total")]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    first, before = ask(), hits()
    assert same(ask(), first)
    assert hits() > before, "prefixes are cached"
    changed = yaml.safe_load(live_server.config.read_text())
    changed["recipes"]["a"]["adapters"][1]["parameters"]["weight"] = 0.9
    original = live_server.config.read_text()
    assert rewrite(live_server, client, changed)["error"] is None
    second = ask()
    assert second[0] != first[0]
    assert second[1] != pytest.approx(first[1], abs=1e-2), "the new artifact says something else"
    assert same(ask(), second), "from its own cached prefix"
    assert same(ask(cache_salt="nobody has used this"), second), "as without any cache"
    assert rewrite(live_server, client, original)["error"] is None
    assert same(ask(), first)


def test_an_adapter_that_vllm_unloads_is_gone_but_what_was_merged_from_it_stays(live_server, client):
    merged = answered_by(client, "a")
    client.post("/unload_lora_adapter", body={"lora_name": "given"}, cast_to=str)
    with pytest.raises(openai.NotFoundError):
        answered_by(client, "given")
    assert answered_by(client, "a") == merged
    body = {"lora_name": "given", "lora_path": str(DEMO / "adapters" / "sort")}
    client.post("/load_lora_adapter", body=body, cast_to=str)
    again = client.completions.create(model="given", prompt="sort: stone ->", max_tokens=8, temperature=0, stop=["\n"])
    assert again.choices[0].text.strip() == "enost", "what vLLM was given now answers, not what it was given before"


def test_other_weights_cannot_be_loaded_under_a_name_of_ours(live_server, client):
    before = answered_by(client, "a")
    body = {"lora_name": "a", "lora_path": str(DEMO / "adapters" / "sort"), "load_inplace": True}
    with pytest.raises(openai.APIStatusError, match="a name of vllm-merge"):
        client.post("/load_lora_adapter", body=body, cast_to=str)
    assert answered_by(client, "a") == before
    assert live_server.answers()
