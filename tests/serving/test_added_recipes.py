# SPDX-License-Identifier: Apache-2.0
"""Recipes that requests add, on a server with everything real but vLLM: at every API process, through reloads, until removed."""

import pytest
import yaml

pytest.importorskip("fastapi", reason="vLLM is not installed")

from tests.serving.played_server import played, recipe_file

RECIPE = {"merge_method": "ties", "adapters": [{"adapter": "a0"}, {"adapter": "m1"}], "parameters": {"density": 0.5}}


@pytest.fixture
def config(tmp_path):
    return recipe_file(tmp_path / "files")


def test_an_added_recipe_is_served_by_every_process_and_aliases_move_to_it(config):
    async def scenario(server):
        one, other = server.apis
        assert (await other.ask("found")).status_code == 404
        added = await one.admin("POST", "recipes/found", merge=RECIPE)
        assert added.status_code == 200, added.text
        answer = added.json()
        assert answer["artifact"].startswith("found@")
        assert "recipe file" in answer["lasts"]
        for api in server.apis:
            got = await api.ask("found")
            assert got.status_code == 200
            assert got.headers["x-vllm-merge-artifact"] == answer["artifact"]
            listed = (await api.client.get("/v1/merge/recipes")).json()
            assert "found" in [row["name"] for row in listed["data"]]
            assert listed["file"]["generation"] == answer["generation"]
        moved = await other.admin("POST", "aliases/assistant", target="found")
        assert moved.status_code == 200, moved.text
        assert (await one.ask("assistant")).json()["tokens"] == (await other.ask("found")).json()["tokens"]
        needed = await one.admin("DELETE", "recipes/found")
        assert needed.status_code == 409
        assert "alias 'assistant' stands for recipe 'found'" in needed.json()["error"]["message"]
        assert (await one.admin("POST", "aliases/assistant/back")).status_code == 200
        assert (await other.admin("DELETE", "recipes/found")).status_code == 200
        for api in server.apis:
            assert (await api.ask("found")).status_code == 404
        assert (await one.admin("DELETE", "recipes/found")).status_code == 404

    played(scenario, config, apis=2)


def test_it_stays_when_the_file_is_read_again_and_a_recipe_of_the_file_comes_first(config):
    async def scenario(server):
        api = server.apis[0]
        assert (await api.admin("POST", "recipes/found", merge="merge:ties(a0,m1;density=0.5)")).status_code == 200
        before = await api.ask("found")
        document = yaml.safe_load(config.read_text())
        document["aliases"]["second"] = "m1"
        config.write_text(yaml.safe_dump(document))
        await server.until(lambda: "second" in server.front.names)
        assert (await api.ask("found")).json()["tokens"] == before.json()["tokens"]
        document["recipes"]["found"] = document["recipes"]["m2"]
        config.write_text(yaml.safe_dump(document))
        same = server.front.names["m2"].digest
        await server.until(lambda: server.front.names["found"].digest == same)
        assert (await api.ask("found")).json()["tokens"] == (await api.ask("m2")).json()["tokens"]
        kept = await api.admin("DELETE", "recipes/found")
        assert kept.json()["digest"] == same, "the file's recipe stays"

    played(scenario, config)


def test_a_file_without_what_it_needs_is_refused(config):
    async def scenario(server):
        api = server.apis[0]
        assert (await api.admin("POST", "recipes/found", merge=RECIPE)).status_code == 200
        document = yaml.safe_load(config.read_text())
        del document["recipes"]["m1"]
        config.write_text(yaml.safe_dump(document))
        await server.until(lambda: server.published.state.error is not None)
        assert "recipe 'found', which a request added" in server.published.state.error
        assert (await api.ask("found")).status_code == 200
        assert (await api.admin("DELETE", "recipes/found")).status_code == 200

    played(scenario, config)


WRONG = [
    ("m0", RECIPE, 409, "name", "the name 'm0' is taken, by recipe 'm0'"),
    ("assistant", RECIPE, 409, "name", "taken, by alias"),
    ("x", {**RECIPE, "merge_method": "tiess"}, 400, "merge.merge_method", "did you mean 'ties'"),
    ("x", {**RECIPE, "path": "/etc"}, 400, "merge.path", "unknown key"),
    ("x", {**RECIPE, "rank": "lossless"}, 400, "merge.rank", "no bound"),
    ("x", "m0", 400, "merge", "begins with 'merge:'"),
    ("x", "merge:ties(a0,a9)", 400, "merge", "no registered adapter or recipe 'a9'"),
]


def test_what_cannot_be_added_is_refused_and_changes_nothing(config):
    async def scenario(server):
        before = server.published.state
        for name, merge, status, param, message in WRONG:
            response = await server.admin("POST", f"recipes/{name}", merge=merge)
            assert response.status_code == status, (name, merge, response.text)
            error = response.json()["error"]
            assert message in error["message"]
            assert param in error["param"]
        assert (await server.admin("POST", "recipes/-x", merge=RECIPE)).status_code == 422, "vLLM makes it a 400"
        assert server.published.state is before

    played(scenario, config)


def test_nobody_adds_or_removes_without_the_token(config):
    async def scenario(server):
        client = server.apis[0].client
        assert (await client.post("/v1/merge/recipes/x", json={"merge": RECIPE})).status_code == 403
        assert (await client.delete("/v1/merge/recipes/m0")).status_code == 403

    played(scenario, config)

    async def without(server):
        client = server.apis[0].client
        assert (await client.post("/v1/merge/recipes/x", json={"merge": RECIPE})).status_code in (404, 405)

    played(without, config, ADMIN_TOKEN=None)
