# SPDX-License-Identifier: Apache-2.0
"""What plain OpenAI clients see of a real server."""

import asyncio
import json
import urllib.request
from pathlib import Path

import openai
import pytest

from tests.conftest import CONFIG, DEMO
from vllm_merge.methods.registry import default_registry
from vllm_merge.recipe.loading import load_recipes

RECIPES = load_recipes(CONFIG, default_registry())
ADAPTERS, MERGES, ALIASES = sorted(RECIPES.adapters), sorted(RECIPES.recipes), sorted(RECIPES.aliases)


def recipes_of(server) -> dict[str, dict]:
    with urllib.request.urlopen(f"{server.url}/v1/merge/recipes") as reply:
        return {row["name"]: row for row in json.load(reply)["data"]}


def test_every_name_is_listed_with_its_parent(demo_server, client):
    listed = [model for model in client.models.list().data if not model.id.startswith("adhoc@")]  # of other tests
    models = {model.id: model.model_dump() for model in listed}
    base = str(DEMO / "model")
    assert set(models) == {base, *ADAPTERS, *MERGES, *ALIASES}
    for name in (*ADAPTERS, *MERGES, *ALIASES):
        assert models[name]["parent"] == base
        assert models[name]["root"] == recipes_of(demo_server)[name]["artifact"]
    for alias in ALIASES:
        assert models[alias]["root"] == models[RECIPES.aliases[alias]]["root"]


def ask(client, route: str, stream: bool, model: str, prompt: str) -> tuple[str, str]:
    """(the answer's text, its `model`), from any of the three generation routes."""
    if route == "completions":
        answer = client.completions.create(model=model, prompt=prompt, max_tokens=16, temperature=0, stream=stream)
        chunks = list(answer) if stream else [answer]
        return "".join(c.choices[0].text for c in chunks if c.choices), chunks[-1].model
    if route == "chat":
        messages = [{"role": "user", "content": prompt}]
        answer = client.chat.completions.create(
            model=model, messages=messages, max_tokens=16, temperature=0, stream=stream
        )
        if not stream:
            return answer.choices[0].message.content, answer.model
        chunks = list(answer)
        return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices), chunks[-1].model
    answer = client.responses.create(model=model, input=prompt, max_output_tokens=16, temperature=0, stream=stream)
    if not stream:
        return answer.output_text, answer.model
    events = list(answer)
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    return text, events[-1].response.model


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("route", ["completions", "chat", "responses"])
def test_every_route_answers_with_the_artifact(demo_server, client, prompts, route, stream):
    known = recipes_of(demo_server)
    right = 0
    for name in (ADAPTERS[0], MERGES[0], ALIASES[0]):
        task = name if name in ADAPTERS else prompts[0]["task"]
        sample = [p for p in prompts if p["task"] == task][:5]
        for item in sample:
            text, model = ask(client, route, stream, name, item["prompt"])
            assert model == known[name]["artifact"]
            right += text.strip() == item["answer"]
    assert right >= 8, "the merged model gives the tasks' answers on every route"


def test_answers_carry_the_artifact_in_their_headers(demo_server, client, prompts):
    raw = client.completions.with_raw_response.create(model=ALIASES[0], prompt=prompts[0]["prompt"], max_tokens=2)
    artifact = recipes_of(demo_server)[ALIASES[0]]["artifact"]
    assert raw.headers["x-vllm-merge-artifact"] == raw.parse().model == artifact
    assert raw.headers["x-vllm-merge-name"] == ALIASES[0]
    assert client.completions.create(model=artifact, prompt="a", max_tokens=1).model == artifact
    plain = client.completions.with_raw_response.create(model=str(DEMO / "model"), prompt="a", max_tokens=1)
    assert "x-vllm-merge-artifact" not in plain.headers


def test_unknown_names_get_vllms_404(client):
    with pytest.raises(openai.NotFoundError, match="The model `nobody` does not exist"):
        client.completions.create(model="nobody", prompt="a", max_tokens=1)


def test_recipes_adapters_and_the_base_in_one_batch_answer_as_they_do_alone(demo_server, client, prompts):
    names = [*MERGES, *ADAPTERS, str(DEMO / "model")]
    questions = [(name, prompts[i * 7 % len(prompts)]["prompt"]) for i, name in enumerate(names * 3)]
    alone = [ask(client, "completions", False, name, prompt) for name, prompt in questions]

    async def together():
        async with openai.AsyncOpenAI(base_url=f"{demo_server.url}/v1", api_key="none", max_retries=0) as many:
            calls = (
                many.completions.create(model=name, prompt=prompt, max_tokens=16, temperature=0)
                for name, prompt in questions
            )
            return [(a.choices[0].text, a.model) for a in await asyncio.gather(*calls)]

    assert asyncio.run(together()) == alone
    assert len({model for _, model in alone}) == len(names)


def test_serve_extends_the_plugin_list_and_passes_the_config_on(demo_server):
    environment = dict(
        line.split("=", 1)
        for line in Path(f"/proc/{demo_server.process.pid}/environ").read_text().split("\0")
        if "=" in line
    )
    assert environment["VLLM_PLUGINS"].split(",") == ["another_plugin", "vllm_merge"]
    assert Path(environment["VLLM_MERGE_CONFIG"]) == CONFIG


def test_the_artifacts_route_shows_what_the_workers_hold(demo_server, client, prompts):
    client.completions.create(model=MERGES[0], prompt=prompts[0]["prompt"], max_tokens=1)
    with urllib.request.urlopen(f"{demo_server.url}/v1/merge/artifacts") as reply:
        (worker,) = json.load(reply)["data"]
    row = next(r for r in worker["artifacts"] if r["name"] == recipes_of(demo_server)[MERGES[0]]["artifact"])
    assert row["kept"]
    assert row["bytes"] > 0
    assert 1 <= row["rank"] <= 64
    assert worker["bytes"] == sum(r["bytes"] for r in worker["artifacts"]) <= worker["budget_bytes"]
