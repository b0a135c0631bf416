# SPDX-License-Identifier: Apache-2.0
"""Routes under /v1/merge on a server with everything real but vLLM: plan, validate, report, download, aliases, adapters."""

import asyncio
import io
import json
import os
import tarfile

import pytest
import torch

pytest.importorskip("fastapi", reason="vLLM is not installed")

from fastapi.routing import APIRoute
from safetensors.torch import load_file, save_file
from starlette.requests import ClientDisconnect

from tests.serving.companions import accompany
from tests.serving.played_server import ADMIN, BASE, environment, played, recipe_file, write_adapter
from vllm_merge.adapters.factors import Adapter
from vllm_merge.forecast.cost import calibrations
from vllm_merge.recipe.yaml_tree import MAX_BYTES
from vllm_merge.serving.routes import foresight
from vllm_merge.serving.routes.json_route import JsonRoute
from vllm_merge.serving.settings import ADAPTER_ROOT_VARIABLE

MERGED = {"merge_method": "ties", "adapters": [{"adapter": "a0"}, {"adapter": "a1"}]}


@pytest.fixture
def config(tmp_path):
    return recipe_file(tmp_path / "files")


async def get(api, path, **headers):
    return await api.client.get(f"/v1/merge/{path}", headers=headers)


# -- plan and validate ------------------------------------------------------------------------------------------------


def test_a_plan_says_what_a_merge_will_make_and_merges_nothing(config, monkeypatch):
    monkeypatch.setattr(foresight, "cost_on", lambda device: None)  # nothing was measured on any CPU

    async def scenario(server):
        api = server.apis[0]
        for merge in (MERGED, "merge:ties(a0,a1)", "m0", "a0"):
            response = await api.client.post("/v1/merge/recipes/plan", json={"merge": merge})
            assert response.status_code == 200, response.text
            found = response.json()
            assert found["state"] == "cold"
            assert found["modules"] == 2
            assert str(server.files) not in response.text
        assert server.service._merging.merges == 0
        found = (await api.client.post("/v1/merge/recipes/plan", json={"merge": "m0"})).json()
        assert found["rank"] == 8, "two adapters of rank 4"
        assert found["bytes"] == 2 * 8 * (48 + 32) * 4
        assert found["predicted"]["seconds"] is None, "nothing like it was merged here"
        assert found["digest"] == server.front.names["m0"].digest
        await api.ask("m0")
        ready = (await api.client.post("/v1/merge/recipes/plan", json={"merge": "m0"})).json()
        assert ready["state"] == "ready"
        assert ready["predicted"]["seconds"] > 0
        assert ready["predicted"]["measured_on"] == "this server"
        row = server.service.store.describe()["artifacts"][0]
        assert (row["rank"], row["bytes"]) == (found["rank"], found["bytes"]), "what was foretold is what was made"

    played(scenario, config)


def test_a_plan_foretells_seconds_from_merges_that_were_measured_elsewhere(config):
    async def scenario(server):
        found = (await server.apis[0].client.post("/v1/merge/recipes/plan", json={"merge": "m0"})).json()
        assert found["predicted"]["seconds"] > 0
        assert found["predicted"]["workspace_bytes"] > 0
        assert found["predicted"]["measured_on"] in {known.device for known in calibrations() if known.type == "cpu"}
        assert server.service._merging.merges == 0

    played(scenario, config)


def test_a_plan_warns_of_what_the_rank_cuts_and_of_missing_modules(config):
    async def scenario(server):
        ask = {"merge": {**MERGED, "rank": 4}}
        found = (await server.apis[0].client.post("/v1/merge/recipes/plan", json=ask)).json()
        assert found["rank"] == 4
        assert any("is cut to 4" in warning for warning in found["warnings"])

    played(scenario, config)


@pytest.mark.parametrize(
    ("merge", "status", "param"),
    [
        ("nobody", 404, "merge"),
        ("/etc/passwd", 404, "merge"),
        ("merge:ties(a0;rank=65)", 400, "model"),
        ({**MERGED, "rank": 65}, 400, "merge.rank"),
        ({**MERGED, "path": "/etc"}, 400, "merge.path"),
    ],
)
def test_a_plan_of_what_is_wrong_says_what(config, merge, status, param):
    async def scenario(server):
        response = await server.apis[0].client.post("/v1/merge/recipes/plan", json={"merge": merge})
        assert (response.status_code, response.json()["error"]["param"]) == (status, param)

    played(scenario, config)


@pytest.mark.parametrize(
    ("method", "path", "body", "says"),
    [
        (
            "POST",
            "recipes/plan",
            {"merge": "asistant"},
            "no recipe, alias or adapter 'asistant', {near} (known: m0, m1, ",
        ),
        (
            "GET",
            "artifacts/asistant/report",
            {},
            "no recipe, alias, adapter or artifact 'asistant', {near} (known: m0, ",
        ),
        (
            "POST",
            "artifacts/asistant/warm",
            {},
            "no recipe, alias, adapter or artifact 'asistant', {near} (known: m0, ",
        ),
        ("POST", "aliases/asistant/back", {}, "the recipe file has no alias 'asistant', {near} (aliases: assistant"),
        ("DELETE", "recipes/zzz", {}, "there is no recipe 'zzz' (recipes: m0, m1"),
        ("DELETE", "adapters/zzz", {}, "there is no adapter 'zzz' (adapters: a0, a1"),
    ],
)
def test_a_name_that_is_none_is_told_with_those_that_there_are(config, method, path, body, says):
    async def scenario(server):
        response = await server.admin(method, path, **body)
        assert response.status_code == 404
        assert response.json()["error"]["message"].startswith(says.format(near="did you mean 'assistant'?"))

    played(scenario, config)


def test_a_list_of_known_names_is_bounded(tmp_path):
    config = recipe_file(tmp_path / "files", aliases={f"alias-{i}": "m0" for i in range(100)})

    async def scenario(server):
        response = await server.admin("POST", "recipes/plan", merge="x" * 1000)
        assert " and " in response.json()["error"]["message"]
        assert len(response.json()["error"]["message"]) < 500

    played(scenario, config)


@pytest.mark.parametrize("content_type", ["application/x-www-form-urlencoded", "text/plain", "application/json", None])
def test_json_is_taken_under_whatever_content_type(config, content_type):
    headers = {**ADMIN, "content-type": content_type} if content_type else ADMIN

    async def scenario(server):
        async def post(path, document):
            body = json.dumps(document).encode()
            return await server.apis[0].client.post(f"/v1/merge/{path}", content=body, headers=headers)

        assert (await post("recipes/plan", {"merge": "m0"})).json()["artifact"].startswith("m0@")
        assert (await post("recipes/found", {"merge": MERGED})).json()["recipe"] == "found"
        assert (await post("aliases/assistant", {"target": "m1"})).json()["target"] == "m1"
        assert (await post("recipes/plan", {"merge": "m0", "more": 1})).status_code == 422
        assert (await post("recipes/plan", None)).status_code == 422

    played(scenario, config)


def test_every_route_that_takes_json_takes_it_so(config):
    async def scenario(server):
        ours = [r for r in server.apis[0].app.routes if isinstance(r, APIRoute) and r.path.startswith("/v1/merge/")]
        taking = {route.path: type(route) for route in ours if route.body_field is not None}
        assert set(taking.values()) == {JsonRoute}, taking
        assert len(taking) == 5, (
            "plan, a recipe, an alias, promote, stop; outcomes and validate read their bodies themselves"
        )

    played(scenario, config)


VALID = "version: 1\nadapters:\n  x: {path: ./x}\nrecipes:\n  r: {merge_method: ties, adapters: [{adapter: x}]}\n"


@pytest.mark.parametrize(
    ("text", "lines", "says"),
    [
        (VALID, [], ""),
        (json.dumps({"version": 1, "adapters": {"x": {"path": "/etc"}}}), [], ""),
        (VALID.replace("ties", "tees"), [5], "unknown merge method"),
        (VALID.replace("adapter: x}", "adapter: y}") + "aliases: {a: nobody}\n", [5, 6], "no registered adapter"),
        ("version: [", [1], "YAML"),
        ("", [1], "is empty"),
        ("a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
            f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(8)
        ), [6], "aliases expanded"),
        ("x: !!python/object/apply:os.system [ls]", [1], "tags are not allowed"),
        ("\n\xff\xfe", [2], "is not UTF-8 text"),
    ],
)  # fmt: skip
def test_validate_finds_every_mistake_with_its_line(config, text, lines, says):
    async def scenario(server):
        response = await server.apis[0].client.post("/v1/merge/recipes/validate", content=text.encode("latin-1"))
        assert response.status_code == 200
        found = response.json()
        assert found["valid"] is (not lines)
        assert [problem["line"] for problem in found["problems"]][: len(lines)] == lines or says in response.text
        assert says in response.text

    played(scenario, config)


def test_validate_reads_no_more_than_a_server_would_and_looks_at_no_path(config, tmp_path):
    async def scenario(server):
        client = server.apis[0].client
        too_large = await client.post("/v1/merge/recipes/validate", content=b"#" * (MAX_BYTES + 1))
        assert too_large.status_code == 413
        for path in (tmp_path, tmp_path / "nowhere"):
            text = VALID.replace("./x", str(path)) + f"base_model: {path}\n"
            assert (await client.post("/v1/merge/recipes/validate", content=text)).json()["valid"]

    played(scenario, config)


# -- artifacts --------------------------------------------------------------------------------------------------------


def test_artifacts_are_listed_with_tier_bytes_leases_and_last_use(config):
    async def scenario(server):
        await server.ask("m0")
        (worker,) = (await get(server.apis[0], "artifacts")).json()["data"]
        (row,) = worker["artifacts"]
        assert (row["tier"], row["kept"]) == ("cache", True)
        assert row["bytes"] > 0
        assert row["leases"] in (0, 1)
        assert row["last_used"] > 1.7e9

    played(scenario, config)


def test_a_report_tells_of_the_merge_from_whichever_tier_the_artifact_came(config, tmp_path):
    async def scenario(server):
        api = server.apis[0]
        assert (await get(api, "artifacts/m0/report")).status_code == 404, "nothing is merged for it"
        await api.ask("m0")
        found = (await get(api, "artifacts/m0/report")).json()
        assert found["report"]["method"] == "task_arithmetic"
        assert found["ranks"] == {f"model.layers.{i}.self_attn.q_proj": 8 for i in range(2)}
        await server.idle()
        await api.admin("POST", "artifacts/m0/evict")
        assert (await get(api, "artifacts/m0/report")).status_code == 404
        await api.admin("POST", "artifacts/m0/warm")
        again = (await get(api, "artifacts/m0/report")).json()
        assert again["origin"] == "disk"
        assert again["report"] == found["report"]
        await api.ask("a0")
        assert (await get(api, "artifacts/a0/report")).json()["report"] is None

    played(scenario, config, DISK=tmp_path / "disk")


@pytest.mark.parametrize("name", ["m0", "a0", "assistant"])
def test_a_download_is_the_peft_folder_of_what_is_served(config, tmp_path, monkeypatch, name):
    from vllm_merge.serving.memory import export
    from vllm_merge.serving.routes import download

    for module in (download, export):
        monkeypatch.setattr(module, "MAX_PIECE", 1000)  # several pieces, across tensors

    async def scenario(server):
        api = server.apis[0]
        response = await api.client.get(f"/v1/merge/artifacts/{name}/download", headers=ADMIN)
        assert response.status_code == 200, response.text
        assert int(response.headers["content-length"]) == len(response.content)
        with tarfile.open(fileobj=io.BytesIO(response.content)) as archive:
            archive.extractall(tmp_path / "out", filter="data")
        (folder,) = (tmp_path / "out").iterdir()
        assert folder.name == server.label(name)
        adapter = Adapter.from_peft(folder)
        artifact = server.service.store.peek(server.front.known(name).digest)
        assert set(adapter.factors) == set(artifact.factors)
        for module, (a, b) in artifact.factors.items():
            assert torch.equal(adapter.factors[module].A, a)
            assert torch.equal(adapter.factors[module].B, b)
            assert adapter.factors[module].scaling == 1
        assert len(load_file(folder / "adapter_model.safetensors")) == 4
        assert (folder / "merge_report.json").exists() is (name != "a0")
        await server.idle()

    played(scenario, config)


def test_a_download_of_what_came_back_in_another_order_is_the_same(tmp_path):
    """The disk has modules by name, 10 before 2; a merge has them as the adapter counts them."""
    config = recipe_file(tmp_path / "files")
    for folder in (tmp_path / "files").glob("a?"):
        tensors = load_file(folder / "adapter_model.safetensors")
        renamed = {
            key.replace("layers.1.", "layers.10.").replace("layers.0.", "layers.2."): t for key, t in tensors.items()
        }
        save_file(renamed, folder / "adapter_model.safetensors")

    async def scenario(server):
        api, store, digest = server.apis[0], server.service.store, server.front.names["m0"].digest
        path = "/v1/merge/artifacts/m0/download"
        first = await api.client.get(path, headers=ADMIN)
        order = list(store.peek(digest).factors)
        await server.idle()
        await api.admin("POST", "artifacts/m0/evict")
        assert store.peek(digest) is None
        again = await api.client.get(path, headers=ADMIN)
        assert list(store.peek(digest).factors) != order
        assert again.content == first.content

    played(scenario, config, DISK=tmp_path / "disk", HOST_BYTES=0)


@pytest.mark.parametrize("sent", [0, 1, 2])
def test_a_download_whose_client_leaves_gives_its_lease_back(config, sent):
    async def scenario(server):
        from vllm_merge.serving.routes.download import Download, LeasedResponse

        front = server.front
        made = Download(front, front.artifacts[front.names["m0"].digest])
        await made.open()
        messages = []

        async def send(message):
            if len(messages) == sent:
                raise OSError("the client is gone")
            messages.append(message)

        async def receive():
            await asyncio.Event().wait()

        scope = {"type": "http", "asgi": {"spec_version": "2.4"}, "extensions": {}}
        with pytest.raises((OSError, ClientDisconnect)):
            await LeasedResponse(made)(scope, receive, send)
        assert not any(artifact.users for artifact in front.artifacts.values())
        await server.idle()

    played(scenario, config)


# -- aliases ----------------------------------------------------------------------------------------------------------


def test_an_alias_moves_and_goes_back_step_by_step_at_every_process(config):
    async def scenario(server):
        one, other = server.apis

        async def row(api):
            (found,) = (await get(api, "aliases")).json()["data"]
            return found

        assert (await one.admin("POST", "aliases/assistant/back")).status_code == 409, "it was not moved"
        assert (await row(one))["before"] is None
        for target in ("m1", "m2"):
            assert (await one.admin("POST", "aliases/assistant", target=target)).status_code == 200
        assert (await row(other))["before"] == "m1"
        assert (await row(other))["file_says"] == "m0"
        back = await other.admin("POST", "aliases/assistant/back")
        assert (back.json()["target"], back.json()["before"]) == ("m1", "m0")
        assert (await one.ask("assistant")).json()["model"] == server.label("m1")
        again = await one.admin("POST", "aliases/assistant/back")
        assert (again.json()["target"], again.json()["file_says"], again.json()["before"]) == ("m0", None, None)
        assert (await one.admin("POST", "aliases/assistant/back")).status_code == 409
        assert (await one.admin("POST", "aliases/nobody/back")).status_code == 404

    played(scenario, config, apis=2)


def test_what_the_file_says_anew_is_not_gone_back_from(config):
    async def scenario(server):
        api = server.apis[0]
        await api.admin("POST", "aliases/assistant", target="m1")
        config.write_text(config.read_text().replace("assistant: m0", "assistant: m3"))
        await server.look()
        assert (await api.admin("POST", "aliases/assistant/back")).status_code == 409
        assert (await get(api, "aliases")).json()["data"][0]["target"] == "m3"

    played(scenario, config)


# -- adapters ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "root"
    folder.mkdir()
    with environment(**{ADAPTER_ROOT_VARIABLE: str(folder)}):
        yield folder


def test_an_adapter_from_the_root_is_served_by_every_process_until_it_is_removed(config, root):
    async def scenario(server):
        one, other = server.apis
        for api in server.apis:
            accompany(api, adhoc="on")
        write_adapter(root / "fresh", 7)
        added = await one.admin("POST", "adapters/fresh")
        assert added.status_code == 200, added.text
        assert added.json()["artifact"].startswith("fresh@")
        answer = await other.ask("fresh")
        assert answer.json()["model"] == added.json()["artifact"]
        assert len(set(answer.json()["tokens"])) == 1
        merged = await other.ask(BASE, merge={**MERGED, "adapters": [{"adapter": "a0"}, {"adapter": "fresh"}]})
        assert merged.status_code == 200
        rows = {row["adapter"]: row for row in (await get(other, "adapters")).json()["data"]}
        assert rows["fresh"]["origin"] == "added"
        assert rows["a0"]["origin"] == "file"
        assert str(root) not in json.dumps(rows)
        config.write_text(config.read_text() + "\n")
        await server.look()
        assert (await other.ask("fresh")).status_code == 200, "it stays when the file is read again"
        assert (await one.admin("POST", "adapters/fresh")).status_code == 409
        assert (await other.admin("DELETE", "adapters/fresh")).status_code == 200
        for api in server.apis:
            assert (await api.ask("fresh")).status_code == 404
            assert (await api.ask(merged.json()["model"])).status_code == 404, "and so is what was made of it"
        assert (await one.admin("DELETE", "adapters/fresh")).status_code == 404
        assert (await one.admin("DELETE", "adapters/a0")).status_code == 409

    played(scenario, config, apis=2)


@pytest.mark.parametrize(
    "name",
    ["..", "%2e%2e", "..%2f..%2fetc", "%2fetc%2fpasswd", "x/../../etc", "-x", ".hidden", "a" * 65, "a%00b", "a\\b"],
)
def test_a_name_is_never_a_path(config, root, name):
    async def scenario(server):
        response = await server.apis[0].client.post(f"/v1/merge/adapters/{name}", headers=ADMIN)
        assert response.status_code in (400, 404, 405, 422)
        assert len((await get(server.apis[0], "adapters")).json()["data"]) == 4

    played(scenario, config)


def test_links_out_of_the_root_are_refused_and_links_inside_are_not(config, root, tmp_path):
    write_adapter(tmp_path / "outside", 1)
    (root / "link").symlink_to(tmp_path / "outside")
    (root / "dangling").symlink_to(tmp_path / "nowhere")
    (root / "circle").symlink_to(root / "circle")
    (root / "itself").symlink_to(root)
    (root / "up").symlink_to("..")
    write_adapter(root / "real", 2)
    (root / "inside").symlink_to(root / "real")
    (root / "mixed").mkdir()
    os.link(root / "real" / "adapter_config.json", root / "mixed" / "adapter_config.json")
    (root / "mixed" / "adapter_model.safetensors").symlink_to(tmp_path / "outside" / "adapter_model.safetensors")
    (root / "file").write_text("x")
    (root / "empty").mkdir()
    (root / "broken").mkdir()
    (root / "broken" / "adapter_config.json").write_text("{}")

    async def scenario(server):
        api = server.apis[0]
        for name in ("link", "dangling", "circle", "itself", "up", "mixed", "file", "nothing"):
            response = await api.admin("POST", f"adapters/{name}")
            assert response.status_code == 404, name
            assert str(tmp_path) not in response.text
        for name in ("empty", "broken"):
            response = await api.admin("POST", f"adapters/{name}")
            assert response.status_code == 422, name
            assert str(tmp_path) not in response.text
        assert (await api.admin("POST", "adapters/inside")).status_code == 200
        taken = await api.admin("POST", "adapters/m0")
        assert taken.status_code == 409

    played(scenario, config)


def test_without_a_root_nothing_can_be_added(config):
    async def scenario(server):
        response = await server.apis[0].admin("POST", "adapters/fresh")
        assert response.status_code == 404
        assert ADAPTER_ROOT_VARIABLE in response.json()["error"]["message"]

    played(scenario, config)


# -- who may ----------------------------------------------------------------------------------------------------------

CHANGES = [
    ("POST", "aliases/assistant"),
    ("POST", "aliases/assistant/back"),
    ("POST", "adapters/fresh"),
    ("DELETE", "adapters/fresh"),
    ("POST", "artifacts/m0/warm"),
    ("POST", "artifacts/m0/pin"),
    ("POST", "artifacts/m0/unpin"),
    ("POST", "artifacts/m0/evict"),
    ("GET", "artifacts/m0/download"),
    ("DELETE", "merges/m0"),
]


def test_without_a_token_configured_nothing_that_changes_things_exists(config):
    async def scenario(server):
        client = server.apis[0].client
        for method, path in CHANGES:
            response = await client.request(method, f"/v1/merge/{path}", headers=ADMIN, json={"target": "m1"})
            assert response.status_code == 404, path
        paths = (await client.get("/openapi.json")).json()["paths"]
        described = {(method.upper(), path) for path in paths for method in paths[path]}
        changing = {(m, p) for m, p in described if p.startswith("/v1/merge/") and (m != "GET" or "download" in p)}
        assert {path for _, path in changing} <= {
            "/v1/merge/recipes/plan", "/v1/merge/recipes/validate", "/v1/merge/outcomes",
        }  # fmt: skip

    played(scenario, config, ADMIN_TOKEN=None)


@pytest.mark.parametrize("token", [None, "", "wrong", "an-admin-token ", "ä"])
def test_a_wrong_token_changes_nothing(config, token):
    async def scenario(server):
        headers = {"x-vllm-merge-admin-token": token.encode()} if token is not None else {}
        for method, path in CHANGES:
            response = await server.apis[0].client.request(
                method, f"/v1/merge/{path}", headers=headers, json={"target": "m1"}
            )
            assert response.status_code == 403, path
            assert response.json()["error"]["type"] == "Forbidden"
        assert server.published.state.generation == 1
        assert server.service._merging.merges == 0

    played(scenario, config)
