# SPDX-License-Identifier: Apache-2.0
"""Merges that requests bring, on a server with everything real but vLLM: what they answer, what they cost, when they go."""

import asyncio
import json
import time

import pytest

pytest.importorskip("fastapi", reason="vLLM is not installed")

from starlette.requests import ClientDisconnect

from tests.serving.companions import accompany
from tests.serving.played_server import BASE, played, recipe_file, write_adapter
from vllm_merge.errors import UserInputError
from vllm_merge.serving.requests import adhoc_table
from vllm_merge.serving.requests.adhoc import AdHocMerges
from vllm_merge.serving.requests.answers import subscribe
from vllm_merge.serving.settings import AdHocSettings

NAME = "merge:task_arithmetic(a0=1.0,a1=0.3)"
RECIPE = {
    "merge_method": "task_arithmetic",
    "adapters": [
        {"adapter": "a0", "parameters": {"weight": 1.0}},
        {"adapter": "a1", "parameters": {"weight": 0.3}},
    ],
}


def recipe(weight: float) -> dict:
    return {**RECIPE, "adapters": [{"adapter": "a0"}, {"adapter": "a1", "parameters": {"weight": weight}}]}


def allow(api, **limits) -> AdHocMerges:
    """Turn merges of requests on at an API process."""
    accompany(api, ",".join(f"{name}={limit}" for name, limit in limits.items()) or "on")
    return api.app.state.vllm_merge_adhoc


@pytest.fixture
def config(tmp_path):
    return recipe_file(tmp_path)


def test_a_recipe_in_the_body_or_as_a_name_answers_as_the_file_s_recipe_does(config):
    async def scenario(server):
        merges = allow(server.apis[0])
        of_file = (await server.ask("m0")).json()
        in_body = await server.ask(BASE, merge=RECIPE)
        as_name = await server.ask(NAME)
        assert in_body.status_code == as_name.status_code == 200
        assert in_body.json()["tokens"] == as_name.json()["tokens"] == of_file["tokens"]
        label = in_body.json()["model"]
        assert label == as_name.json()["model"] == in_body.headers["x-vllm-merge-artifact"]
        assert label.startswith("adhoc@")
        assert (await server.ask(label)).json()["tokens"] == of_file["tokens"], "the label alone is enough from now on"
        other = await server.ask(NAME.replace("0.3", "0.4"))
        assert other.json()["tokens"] != of_file["tokens"]
        assert len(merges.table.entries()) == 2
        assert server.service._merging.merges == 2, (
            "one for the file's recipe and those that equal it, one for the other"
        )

    played(scenario, config)


def test_the_list_says_the_rank_that_a_result_has_and_the_most_that_it_may_have(config):
    async def listed(server):
        (row,) = (await server.apis[0].client.get("/v1/merge/adhoc")).json()["data"]
        return row["rank"], row["max_rank"]

    async def scenario(server):
        allow(server.apis[0])
        label = (await server.ask(BASE, merge=RECIPE)).json()["model"]
        assert await listed(server) == (8, 64), "two adapters of rank 4, and what the server takes"
        await server.idle()
        assert (await server.admin("POST", f"artifacts/{label}/evict")).json()["evicted"]
        assert await listed(server) == (None, 64)

    played(scenario, config)


@pytest.mark.parametrize(("rank", "most"), [(6, 6), ({"energy": 0.9}, 64)])
def test_the_most_rank_is_the_recipe_s_where_it_says_one(config, rank, most):
    async def scenario(server):
        allow(server.apis[0])
        assert (await server.ask(BASE, merge={**RECIPE, "rank": rank})).status_code == 200
        (row,) = (await server.apis[0].client.get("/v1/merge/adhoc")).json()["data"]
        assert (0 < row["rank"] <= 8, row["max_rank"]) == (True, most)

    played(scenario, config)


def test_it_is_off_by_default(config):
    async def scenario(server):
        for response in (await server.ask(BASE, merge=RECIPE), await server.ask(NAME)):
            assert response.status_code == 400
            error = response.json()["error"]
            assert "VLLM_MERGE_ADHOC=on" in error["message"]
            assert error["type"] == "invalid_request_error"
        assert (await server.ask(BASE)).status_code == 200
        assert AdHocSettings.read({}) is AdHocSettings.read({"VLLM_MERGE_ADHOC": "off"}) is None

    played(scenario, config)


def test_vllm_never_sees_the_recipe(config):
    async def scenario(server):
        allow(server.apis[0])
        seen = []
        server.apis[0].app.router.routes.clear()

        @server.apis[0].app.post("/v1/embeddings")
        async def embeddings(body: dict):
            seen.append(body)
            return {}

        await server.apis[0].client.post("/v1/embeddings", json={"model": "whatever", "input": "x", "merge": RECIPE})
        (body,) = seen
        assert set(body) == {"model", "input"}
        assert body["model"] in server.front.adhoc

    played(scenario, config)


@pytest.mark.parametrize("path", ["/pooling", "/invocations", "/tokenize", "/nowhere"])
def test_where_vllm_asks_for_no_api_key_nobody_brings_a_recipe(config, path):
    """Else whoever has no key could use up the rate, and push out what others use."""

    async def scenario(server):
        merges = allow(server.apis[0])
        for body in ({"model": BASE, "merge": RECIPE}, {"model": NAME}):
            headers = {"x-amzn-sagemaker-adapter-identifier": body["model"]}  # which /invocations goes by
            response = await server.apis[0].client.post(path, json=body, headers=headers)
            assert response.status_code == 400
            assert "routes under /v1/" in response.json()["error"]["message"]
        assert merges.table.entries() == []

    played(scenario, config)


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"merge": {**RECIPE, "path": "/etc"}}, "merge.path", "unknown key"),
        ({"merge": {**RECIPE, "rank": 65}}, "merge.rank", "at most 64 here"),
        ({"merge": {**RECIPE, "adapters": [{"adapter": "/etc/passwd"}]}}, "merge.adapters[0].adapter", "no registered"),
        ({"merge": 3}, "merge", "expected a recipe"),
        ({"merge": None}, "merge", "expected a recipe"),
        ({"merge": {**RECIPE, "parameters": json.loads("[" * 900 + "]" * 900)}}, "merge", "nested deeper"),
        ({"model": "merge:task_arithmetic(a0=x)"}, "model", "column 26: expected a number"),
        ({"model": NAME, "merge": RECIPE}, "model", "send one of the two"),
        ({"merge": {**RECIPE, "adapters": [{"adapter": "a0"}] * 9}}, "merge.adapters", "takes 8 at most"),
    ],
)
def test_errors_name_the_field_in_openai_s_shape(config, body, param, says):
    async def scenario(server):
        allow(server.apis[0])
        response = await server.apis[0].client.post("/v1/completions", json={"model": BASE, "prompt": "x", **body})
        assert response.status_code == 400
        error = response.json()["error"]
        assert (error["param"], error["code"], error["type"]) == (param, 400, "invalid_request_error")
        assert says in error["message"]
        assert str(server.files) not in error["message"]
        assert server.front.adhoc == {}

    played(scenario, config)


@pytest.mark.parametrize("text", ["x" * (1 << 17), "\ud800"])
def test_no_text_of_a_request_is_too_much_for_the_control_line(config, text):
    """A message that is too long would close it, and take the leases of all that runs along."""
    weight = [{"filter": text, "value": 1.0}, {"value": 0.5}]

    async def scenario(server):
        allow(server.apis[0])
        bad = {**RECIPE, "adapters": [{"adapter": "a0", "parameters": {"weight": weight}}, {"adapter": "a1"}]}
        for path, body in (("completions", {"model": BASE, "prompt": "x"}), ("merge/recipes/plan", {})):
            content = json.dumps({**body, "merge": bad})  # which escapes what UTF-8 cannot say
            headers = {"content-type": "application/json"}
            response = await server.apis[0].client.post(f"/v1/{path}", content=content, headers=headers)
            assert (response.status_code, response.json()["error"]["param"]) == (400, "merge")
        assert server.front.adhoc == {}

    played(scenario, config)


def test_a_label_that_is_unknown_or_forgotten_is_a_clear_404(config):
    async def scenario(server):
        merges = allow(server.apis[0], idle=1)
        response = await server.ask("adhoc@0123456789ab")
        assert response.status_code == 404
        assert "send the recipe again" in response.json()["error"]["message"]
        label = (await server.ask(BASE, merge=recipe(0.5))).json()["model"]
        digest = server.front.adhoc[label].digest
        await server.idle()
        assert label in server.front.listed()
        merges.table.get(digest).used -= 2
        merges.table.sweep()
        await server.until(lambda: server.service.store.peek(digest) is None)
        assert label not in server.front.listed()
        assert label not in server.apis[0].app.state.openai_serving_models.lora_requests
        assert digest not in server.front.artifacts
        assert (await server.ask(label)).status_code == 404
        assert (await server.ask(BASE, merge=recipe(0.5))).json()["model"] == label, "the recipe itself works again"

    played(scenario, config)


def test_what_is_used_is_not_forgotten(config):
    async def scenario(server):
        merges = allow(server.apis[0], idle=1)
        label = (await server.ask(NAME)).json()["model"]
        server.engine.steps.clear()
        running = asyncio.ensure_future(server.ask(label))
        digest = server.front.adhoc[label].digest
        await server.until(lambda: server.front.artifacts[digest].users)
        merges.table.get(digest).used -= 100
        merges.table.sweep()
        assert merges.table.get(digest) is not None
        server.engine.steps.set()
        assert (await running).status_code == 200

    played(scenario, config)


def test_the_file_s_artifact_stays_when_the_request_s_name_for_it_goes(config):
    async def scenario(server):
        merges = allow(server.apis[0], idle=1)
        await server.ask("m0")
        label = (await server.ask(NAME)).json()["model"]
        digest = server.front.adhoc[label].digest
        assert server.front.names["m0"].digest == digest
        await server.idle()
        merges.table.get(digest).used -= 100
        merges.table.sweep()
        assert server.front.adhoc == {}
        assert (await server.ask("m0")).status_code == 200
        assert server.service._merging.merges == 1

    played(scenario, config)


def test_the_least_recently_used_goes_for_a_new_one_and_what_runs_stays(config):
    async def scenario(server):
        allow(server.apis[0], count=2)
        labels = [(await server.ask(BASE, merge=recipe(w))).json()["model"] for w in (0.1, 0.2)]
        await server.idle()
        await server.ask(labels[0])
        await server.idle()
        third = (await server.ask(BASE, merge=recipe(0.3))).json()["model"]
        assert set(server.front.adhoc) == {labels[0], third}
        server.engine.steps.clear()
        running = [asyncio.ensure_future(server.ask(label)) for label in (labels[0], third)]
        await server.until(lambda: sum(a.users for a in server.front.artifacts.values()) >= 2)
        refused = await server.ask(BASE, merge=recipe(0.5))
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "5")
        assert "2 merges of requests" in refused.json()["error"]["message"]
        server.engine.steps.set()
        assert [response.status_code for response in await asyncio.gather(*running)] == [200, 200]

    played(scenario, config)


def test_a_merge_that_gets_no_room_pushes_nobody_out_and_counts_as_none(config):
    async def scenario(server):
        merges = allow(server.apis[0], bytes=2 * 5120, rate=3)
        labels = [(await server.ask(BASE, merge=recipe(w))).json()["model"] for w in (0.1, 0.2)]
        await server.idle()
        server.engine.steps.clear()
        running = asyncio.ensure_future(server.ask(labels[0]))
        await server.until(lambda: any(a.users for a in server.front.artifacts.values()))
        large = {**RECIPE, "adapters": [{"adapter": f"a{i}"} for i in range(4)]}
        assert [(await server.ask(BASE, merge=large)).status_code for _ in range(3)] == [429] * 3
        assert {entry.label for entry in merges.table.entries()} == set(labels)
        server.engine.steps.set()
        assert (await running).status_code == 200
        assert (await server.ask(BASE, merge=recipe(0.3))).status_code == 200, "the rate is for merges that began"

    played(scenario, config)


def test_what_is_used_at_another_process_is_not_the_first_to_go(config):
    async def scenario(server):
        one, other = server.apis
        first, second = allow(one, count=2), allow(other, count=2)
        labels = [(await one.ask(BASE, merge=recipe(w))).json()["model"] for w in (0.1, 0.2)]
        await server.until(lambda: len(second.table.entries()) == 2)
        await server.idle()
        await other.ask(labels[0])
        await server.idle()
        second.table.sweep()
        await server.until(lambda: [entry.label for entry in first.table.entries()] == labels[::-1])
        third = (await one.ask(BASE, merge=recipe(0.3))).json()["model"]
        assert set(one.front.adhoc) == {labels[0], third}

    played(scenario, config, apis=2)


def test_a_merge_that_is_forgotten_while_it_runs_leaves_when_it_has_ended(config):
    async def scenario(server):
        merges = allow(server.apis[0])
        label = (await server.ask(BASE, merge=recipe(0.5))).json()["model"]
        digest = server.front.adhoc[label].digest
        await server.idle()
        server.engine.steps.clear()
        running = asyncio.ensure_future(server.ask(label))
        await server.until(lambda: server.front.artifacts[digest].users)
        write_adapter(server.files / "a0", 99)
        config.write_text(config.read_text() + "\n")
        await server.look()
        merges._follow()
        assert label not in server.front.adhoc
        merges.table.sweep()
        assert digest in server.front.artifacts
        server.engine.steps.set()
        assert (await running).status_code == 200
        await server.idle()
        merges.table.sweep()
        assert digest not in server.front.artifacts
        await server.until(lambda: server.service.store.peek(digest) is None)

    played(scenario, config)


def test_a_process_does_not_obey_its_own_word(config):
    """Else what it has forgotten and taken in again would go when it hears itself."""

    async def scenario(server):
        table = allow(server.apis[0]).table
        await server.ask(NAME)
        await server.idle()
        (entry,) = table.entries()
        table._forget(entry.plan.digest)
        table.take_in(entry.plan, entry.bytes)
        (again,) = table.entries()
        await server.front.links.ask("tell", event={"event": "last"})
        seen = []
        server.front.links.all[0]._on_event = seen.append
        await server.front.links.ask("tell", event={"event": "last"})
        await server.until(lambda: bool(seen))
        assert table.entries() == [again]
        assert table.entries()[0] is again

    played(scenario, config)


def test_bytes_and_rate_are_bounded(config, monkeypatch):
    async def scenario(server):
        merges = allow(server.apis[0], bytes=2 * 5120 - 1, rate=2)
        too_large = await server.ask(BASE, merge={**recipe(0.1), "adapters": [{"adapter": f"a{i}"} for i in range(4)]})
        assert too_large.status_code == 400
        assert "at most 10,239 here" in too_large.json()["error"]["message"]
        assert (await server.ask(BASE, merge=recipe(0.1))).status_code == 200
        await server.idle()
        assert (await server.ask(BASE, merge=recipe(0.2))).status_code == 200
        assert len(merges.table.entries()) == 1, "both together have too many bytes"
        late = await server.ask(BASE, merge=recipe(0.3))
        assert late.status_code == 429
        assert 1 <= int(late.headers["retry-after"]) <= 60
        assert (await server.ask(BASE, merge=recipe(0.2))).status_code == 200, "what is kept costs nothing"
        now = time.monotonic()
        monkeypatch.setattr(adhoc_table.time, "monotonic", lambda: now + 61)
        assert (await server.ask(BASE, merge=recipe(0.3))).status_code == 200

    played(scenario, config)


def test_many_requests_for_one_recipe_are_one_merge(config):
    async def scenario(server):
        merges = allow(server.apis[0], rate=1)
        answers = await asyncio.gather(*(server.ask(BASE, merge=recipe(0.7)) for _ in range(32)))
        assert {answer.status_code for answer in answers} == {200}
        assert len({answer.json()["model"] for answer in answers}) == 1
        assert server.service._merging.merges == 1
        assert len(merges.table.entries()) == 1

    played(scenario, config)


def test_each_request_says_itself_what_happens_on_a_miss(config):
    async def scenario(server):
        allow(server.apis[0])
        rejected = await server.ask(BASE, merge={**RECIPE, "on_miss": "reject"})
        assert rejected.status_code == 503
        assert "retry-after" in rejected.headers
        stand_in = await server.ask(BASE, merge={**recipe(0.9), "on_miss": "fallback", "fallback": "base"})
        assert stand_in.json()["model"] == BASE
        assert stand_in.headers["x-vllm-merge-fallback"].startswith("adhoc@")
        assert (await server.ask(BASE, merge=recipe(0.9))).json()["model"].startswith("adhoc@")

    played(scenario, config)


def test_facts_of_an_answer_say_adhoc_and_no_more(config):
    facts = []

    async def scenario(server):
        allow(server.apis[0])
        end = subscribe(facts.append)
        try:
            await server.ask(NAME)
        finally:
            end()

    played(scenario, config)
    (fact,) = facts
    assert (fact.kind, fact.recipe, fact.status) == ("adhoc", "adhoc", 200)
    assert fact.label.startswith("adhoc@")


@pytest.mark.parametrize(
    ("raised", "error"), [(RuntimeError("a bug"), "exception"), (ClientDisconnect(), "client_left")]
)
def test_an_answer_that_an_exception_ends_is_no_client_that_left(config, raised, error):
    """The framework's own 500 is sent outside of our middleware, which sees no answer at all."""
    facts = []

    async def scenario(server):
        app = server.apis[0].app
        app.router.routes.clear()

        @app.post("/v1/completions")
        async def completions():
            raise raised

        end = subscribe(facts.append)
        try:
            assert (await server.ask("m0")).status_code == 500
        finally:
            end()

    played(scenario, config)
    assert [fact.error for fact in facts] == [error]


def test_an_adapter_that_changes_takes_its_merges_along(config):
    async def scenario(server):
        allow(server.apis[0])
        label = (await server.ask(NAME)).json()["model"]
        await server.idle()
        write_adapter(server.files / "a0", 99)
        config.write_text(config.read_text() + "\n")
        await server.look()
        assert (await server.ask(label)).status_code == 404
        again = (await server.ask(NAME)).json()["model"]
        assert again != label
        assert (await server.ask("m0")).json()["model"].endswith(again.removeprefix("adhoc"))

    played(scenario, config)


def test_a_label_works_at_every_process_and_is_forgotten_by_all(config):
    async def scenario(server):
        one, other = server.apis
        first, second = allow(one, idle=5), allow(other, idle=5)
        answer = await one.ask(NAME)
        label = answer.json()["model"]
        digest = one.front.adhoc[label].digest
        await server.until(lambda: label in other.front.listed())
        there = await other.ask(label)
        assert there.json() == answer.json()
        assert there.headers["x-vllm-merge-artifact"] == label
        by_recipe = await other.ask(BASE, merge=RECIPE)
        assert by_recipe.json()["model"] == label, "each process finds the same digest by itself"
        await server.idle()
        first.table.get(digest).used -= 4
        second.table.sweep()  # tells the first process that it was used
        await server.until(lambda: time.monotonic() - first.table.get(digest).used < 4)
        first.table.get(digest).used -= 6
        first.table.sweep()
        await server.until(lambda: label not in other.front.listed())
        assert label not in other.app.state.openai_serving_models.lora_requests
        assert (await other.ask(label)).status_code == 404
        assert (await other.ask(NAME)).json() == answer.json()

    played(scenario, config, apis=2)


@pytest.mark.parametrize(
    "value", ["yes", "count=0", "count=1,count=2", "count", "size=3", "rank=-1", "count=1;rank=2", "count=1.5", ","]
)
def test_wrong_settings_stop_the_start(value):
    with pytest.raises(UserInputError, match=r"VLLM_MERGE_ADHOC is .*whole numbers"):
        AdHocSettings.read({"VLLM_MERGE_ADHOC": value})


def test_settings_name_what_they_change():
    assert AdHocSettings.read({"VLLM_MERGE_ADHOC": "on"}) == AdHocSettings()
    found = AdHocSettings.read({"VLLM_MERGE_ADHOC": "count=2, rank=16,idle=60"})
    assert found == AdHocSettings(count=2, rank=16, idle=60)
