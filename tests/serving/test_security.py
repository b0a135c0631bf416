# SPDX-License-Identifier: Apache-2.0
"""What docs/security.md promises, tried: routes without the token, paths in names, floods, swapped files, log injection."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

pytest.importorskip("fastapi", reason="vLLM is not installed")

import torch
import yaml
from fastapi import FastAPI
from safetensors.torch import save_file

from tests.serving.played_server import TOKEN, PlayedServer, environment, leftovers, played, recipe_file, write_adapter
from vllm_merge.adapters.peft import read_adapter
from vllm_merge.serving.control.control import ControlError, runtime_dir
from vllm_merge.serving.control.front import ArtifactUnavailable
from vllm_merge.serving.folders import without_folders
from vllm_merge.serving.memory.disk_tier import DiskTier
from vllm_merge.serving.plugin import CONFIG_VARIABLE, MergeEndpoints
from vllm_merge.serving.requests.replies import told
from vllm_merge.serving.routes import event_routes
from vllm_merge.serving.routes.admin import ADMIN_HEADER
from vllm_merge.serving.settings import ADMIN_TOKEN_VARIABLE

# Routes that answer a POST without the token: they change nothing of what is served. Whoever adds one says so here.
OPEN = {("POST", "/v1/merge/recipes/validate"), ("POST", "/v1/merge/recipes/plan"), ("POST", "/v1/merge/outcomes")}
READS = {"GET", "HEAD", "OPTIONS"}


def routes_of(app: FastAPI) -> list[tuple[str, str]]:
    """(method, path) of every route of ours, as the application has it."""
    found = [(method.upper(), path) for path, methods in app.openapi()["paths"].items() for method in methods]
    return sorted((method, path) for method, path in found if path.startswith("/v1/merge"))


def application(token: str | None) -> FastAPI:
    app = FastAPI()
    with environment(**{CONFIG_VARIABLE: "recipes.yaml", ADMIN_TOKEN_VARIABLE: token or ""}):
        MergeEndpoints().attach_router(app)
    return app


def guarded_routes(app: FastAPI) -> list[tuple[str, str]]:
    """Those that need the token: all that change something, and the download of an artifact's weights."""
    return [
        (method, path)
        for method, path in routes_of(app)
        if (method not in READS and (method, path) not in OPEN) or path.endswith("/download")
    ]


def filled(path: str, value: str) -> str:
    return re.sub(r"\{[^}]*\}", value, path)


# -- tokens ---------------------------------------------------------------------------------------------------------------

WRONG_TOKENS = [None, "", "wrong", TOKEN[:-1], TOKEN + "x", TOKEN.upper(), f" {TOKEN}é", "x" * 5000]


def test_without_a_configured_token_no_guarded_route_exists():
    routes = guarded_routes(application(TOKEN))
    assert len(routes) >= 10
    assert ("GET", "/v1/merge/artifacts/{name}/download") in routes
    assert set(routes_of(application(TOKEN))) >= OPEN, "what is said to be open is there"
    assert guarded_routes(application(None)) == []


def test_without_the_right_token_nothing_changes(tmp_path):
    async def scenario(server: PlayedServer) -> None:
        await server.ask("m0")
        await server.idle()
        before = await state_of(server)
        guarded = guarded_routes(server.apis[0].app)
        assert len(guarded) >= 10
        for token in WRONG_TOKENS:
            given = {} if token is None else {ADMIN_HEADER: token.encode()}
            elsewhere = {"authorization": f"Bearer {TOKEN}", "cookie": f"{ADMIN_HEADER}={TOKEN}"}
            for method, path in guarded:
                for name in ("m0", "assistant", "a1", "0" * 64):
                    url = f"{filled(path, name)}?{ADMIN_HEADER}={TOKEN}&token={TOKEN}"
                    body = {"target": "m1", "token": TOKEN, "path": "a1", "name": "m1", "arm": "m1"}
                    headers = {**given, **elsewhere}
                    reply = await server.apis[0].client.request(method, url, headers=headers, json=body)
                    assert reply.status_code == 403, (method, path, reply.text)
                    assert TOKEN not in reply.text
        assert await state_of(server) == before

    played(scenario, recipe_file(tmp_path))


async def state_of(server: PlayedServer) -> Any:
    """What a changing route could change."""
    paths = ("recipes", "aliases", "artifacts")
    state = [(await server.apis[0].client.get(f"/v1/merge/{path}")).json() for path in paths]
    store = server.service.store
    return state[0], state[1], sorted(store._kept), sorted(store._pins), sorted(server.files.rglob("*"))


def test_without_a_configured_token_no_token_opens_anything(tmp_path):
    async def scenario(server: PlayedServer) -> None:
        before = await state_of(server)
        for method, path in guarded_routes(application(TOKEN)):
            for given in ("", TOKEN, "None"):
                reply = await server.apis[0].client.request(
                    method, filled(path, "m0"), headers={ADMIN_HEADER: given}, json={"target": "m1"}
                )
                assert reply.status_code in (404, 405), (method, path)
        assert await state_of(server) == before

    played(scenario, recipe_file(tmp_path), ADMIN_TOKEN=None)


# -- paths ----------------------------------------------------------------------------------------------------------------

CANARY = "canary7f3a"
EVENTS = (
    "open",
    "os.",
    "shutil.",
    "glob.",
    "subprocess.",
    "exec",
    "import",
    "socket.",
    "tempfile.",
    "pathlib.",
    "ctypes.",
)
_seen: list[str] | None = None


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _seen is not None and event.startswith(EVENTS):
        text = " ".join(str(argument) for argument in arguments)
        if CANARY in text:
            _seen.append(f"{event}: {text[:200]}")


sys.addaudithook(_hook)  # which cannot be taken away again: it does nothing unless `watched` runs


@contextmanager
def watched() -> Iterator[list[str]]:
    """What the process does with files, modules, sockets and programs whose name has the canary in it."""
    global _seen
    _seen = []
    try:
        yield _seen
    finally:
        _seen = None


TRAVERSALS = [
    CANARY,
    f"../../{CANARY}",
    f"/tmp/{CANARY}",
    f"..%2f..%2f{CANARY}",
    f"....//{CANARY}",
    f"~/{CANARY}",
    f"file:///{CANARY}",
    f"s3://bucket/{CANARY}",
    f"vllm-merge://{CANARY}/0",
    f"{CANARY}\0.safetensors",
    f"{CANARY}\n{CANARY}",
    f"merge:linear(../{CANARY}=1,{CANARY}=1)",
    f"m0@{CANARY}",
    f"$({CANARY})",
    f"{{{{{CANARY}}}}}",
    f"org/{CANARY}",
]


def test_the_watch_sees_what_it_is_to_see(tmp_path):
    with watched() as seen:
        (tmp_path / CANARY).exists()
        with pytest.raises(OSError):
            (tmp_path / CANARY).read_text()
        shutil.rmtree(tmp_path / CANARY, ignore_errors=True)
    assert any(event.startswith("open") for event in seen)


def test_nothing_of_a_request_reaches_the_file_system(tmp_path):
    async def scenario(server: PlayedServer) -> None:
        client = server.apis[0].client
        for text in TRAVERSALS:
            bodies: list[dict[str, Any]] = [
                {"model": text, "prompt": text, "user": text},
                {"model": "m0", "prompt": text, "merge": {"merge_method": text, "adapters": [{"adapter": text}]}},
                {"model": "m0", "prompt": text, "lora_path": text, "lora_request": {"lora_path": text}, "path": text},
                {"model": "m0", "prompt": text, "merge": {"adapters": {text: {"path": text}}, "path": text}},
            ]
            for body in bodies:
                await client.post("/v1/completions", json=body, headers={"x-request-id": quote(text)})
            for method, path in [*routes_of(server.apis[0].app), ("GET", "/merge/{file}")]:
                if path.endswith("/events"):
                    continue  # does not end
                for token in (TOKEN, "wrong"):
                    document = dict.fromkeys(("target", "name", "path", "revision", "adapter", "recipe", "file"), text)
                    url = (
                        f"{filled(path, quote(text, safe=''))}?name={quote(text)}&path={quote(text)}&file={quote(text)}"
                    )
                    reply = await client.request(method, url, headers={ADMIN_HEADER: token}, json=document)
                    assert reply.status_code != 500, (method, path, text, reply.text)
        await server.idle()

    with watched() as seen:
        played(scenario, recipe_file(tmp_path), ADHOC="on", DISK=str(tmp_path / "merges"), HOST_BYTES=1 << 16)
    assert seen == []


def test_the_disk_tier_takes_digests_and_nothing_else(tmp_path):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "artifact.json").write_text("{}")
    disk = DiskTier(str(tmp_path / "merges"), 1 << 20)
    for name in (
        "../secret",
        "..",
        "",
        "secret",
        "/etc",
        "0" * 63,
        "0" * 63 + "G",
        "0" * 64 + "/../x",
        "0" * 64 + "\n",
    ):
        assert not disk.holds(name)
        assert disk.read(name) is None
        disk.touch(name)
        with pytest.raises(ValueError, match="no digest"):
            disk.remove(name)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["artifact.json", "merges", "secret"]


@pytest.mark.parametrize(
    "name", ["../x", "a/b", "/etc/passwd", "a b", "", ".", "..", "a\nb", "x" * 65, "é", "a\0b", "~"]
)
@pytest.mark.parametrize("kind", ["adapters", "recipes", "aliases"])
def test_names_in_a_recipe_file_are_no_paths(tmp_path, kind, name):
    from vllm_merge.recipe.problems import RecipeError
    from vllm_merge.recipe_files import load_recipes

    config = recipe_file(tmp_path)
    document = yaml.safe_load(config.read_text())
    document[kind][name] = next(iter(document[kind].values()))
    config.write_text(yaml.safe_dump(document))
    with pytest.raises(RecipeError, match="1 to 64 letters, digits"):
        load_recipes(config)


# -- floods -----------------------------------------------------------------------------------------------------------------


def test_a_flood_of_cold_recipes_is_answered_and_leaves_nothing(tmp_path):
    config = recipe_file(tmp_path)
    document = yaml.safe_load(config.read_text())
    for i in range(60):
        inputs = [{"adapter": "a0", "parameters": {"weight": 2.0 + i}}, {"adapter": "a3"}]
        document["recipes"][f"f{i}"] = {"merge_method": "linear", "adapters": inputs, "load": "lazy"}
    config.write_text(yaml.safe_dump(document))

    async def scenario(server: PlayedServer) -> None:
        await server.ask("m0")
        await server.idle()
        before = leftovers(server)
        longest = 0

        async def watch() -> None:
            nonlocal longest
            while True:
                longest = max(longest, server.service._line.describe()["waiting"])
                await asyncio.sleep(0.001)

        watching = asyncio.ensure_future(watch())
        replies = await asyncio.gather(*(server.ask(f"f{i % 60}") for i in range(300)))
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        assert longest <= 3
        found = {reply.status_code for reply in replies}
        assert found == {200, 503}
        assert all(int(reply.headers["retry-after"]) >= 1 for reply in replies if reply.status_code == 503)
        await server.idle()
        after = leftovers(server)
        assert {key: after[key] for key in before if after[key] > before[key]} == {}
        assert (await server.ask("m0")).status_code == 200

    played(scenario, config, QUEUE=3)


WRONG_BODIES = [
    b"",
    b"{",
    b"[" * 100_000,
    b'{"model":' * 20_000,
    b'{"model": "' + b"x" * 1_000_000 + b'"}',
    b'{"model": "m0", "n": 1' + b"0" * 100_000 + b"}",
    b'{"model": ["m0"]}',
    b'{"model": {"m0": 1}}',
    b'{"model": "m0\\ud800", "prompt": "x"}',
    b"\xff\xfe{}",
    json.dumps({"model": "m0", "prompt": "x", "merge": [[[[]]]] * 1000}).encode(),
]


def test_bodies_that_are_wrong_on_purpose_hurt_nobody_else(tmp_path):
    async def scenario(server: PlayedServer) -> None:
        right = (await server.ask("m0")).json()
        for body in WRONG_BODIES:
            reply = await server.apis[0].client.post(
                "/v1/completions", content=body, headers={"content-type": "application/json"}
            )
            assert reply.status_code >= 400, body[:40]
            assert (await server.ask("m0")).json() == right

    played(scenario, recipe_file(tmp_path), ADHOC="on")


# -- files ------------------------------------------------------------------------------------------------------------------


def swap_weights(folder: Path, other: Path) -> None:
    shutil.copy(other / "adapter_model.safetensors", folder / "adapter_model.safetensors")


def swap_config(folder: Path, other: Path) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": 99}))


def swap_folder(folder: Path, other: Path) -> None:
    folder.rename(folder.with_name("away"))
    folder.symlink_to(other)


def swap_for_a_link(folder: Path, other: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.safetensors").symlink_to(other / "adapter_model.safetensors")


@pytest.mark.parametrize("swap", [swap_weights, swap_config, swap_folder, swap_for_a_link])
def test_what_was_hashed_is_what_is_merged(tmp_path, swap):
    config = recipe_file(tmp_path)
    write_adapter(tmp_path / "other", 99)

    async def scenario(server: PlayedServer) -> None:
        right = (await server.ask("m1")).json()
        swap(tmp_path / "a0", tmp_path / "other")
        replies = [await server.ask(name) for name in ("m0", "a0", "assistant")]
        assert {reply.status_code for reply in replies} == {500}
        assert all("the content changed since it was registered" in reply.text for reply in replies)
        assert (await server.ask("m1")).json() == right

    played(scenario, config, SOURCE_BYTES=0)


def test_adapters_are_added_from_inside_the_root_alone(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    for folder in (outside, root / "good", root / "linked-weights", root / "linked-config"):
        write_adapter(folder, 50)
    (root / "linked-folder").symlink_to(outside)
    (root / "linked-up").symlink_to("..")
    (root / "linked-root").symlink_to(root)
    for folder, file in (("linked-weights", "adapter_model.safetensors"), ("linked-config", "adapter_config.json")):
        (root / folder / file).unlink()
        (root / folder / file).symlink_to(outside / file)
    (root / "linked-inside").symlink_to(root / "good")

    async def scenario(server: PlayedServer) -> None:
        before = await state_of(server)
        names = ["linked-folder", "linked-up", "linked-root", "linked-weights", "linked-config", "nobody"]
        for name in [
            *names,
            "..%2foutside",
            "%2e%2e",
            "..",
            "%2ftmp",
            "good%2f..%2f..%2foutside",
            "good%00",
            "good%0a",
        ]:
            reply = await server.admin("POST", f"adapters/{name}")
            assert reply.status_code in (400, 404, 405, 422), (name, reply.text)
            assert str(tmp_path) not in reply.text, "the answer tells no path"
        assert await state_of(server) == before
        for name in ("good", "linked-inside"):
            assert (await server.admin("POST", f"adapters/{name}")).status_code == 200
        right = (await server.ask("good")).json()
        await server.idle()
        await server.admin("POST", "artifacts/good/evict")
        await server.until(lambda: server.service.store.peek(server.front.known("good").digest) is None)
        shutil.rmtree(root / "good")
        (root / "good").symlink_to(tmp_path / "a1")  # another adapter, out of the root, after it was let in
        reply = await server.ask("good")
        assert (right["model"].partition("@")[0], reply.status_code) == ("good", 500)
        assert "the content changed since it was registered" in reply.text

    played(scenario, recipe_file(tmp_path), ADAPTER_ROOT=str(root), SOURCE_BYTES=0)


# -- logs and headers ---------------------------------------------------------------------------------------------------------

EVIL = "x\r\nset-cookie: a=b\x1b[2J\u2028\x00 ERROR root logged in"


def test_what_vllm_was_given_under_an_evil_name_stays_vllms(tmp_path):
    """--lora-modules and /v1/load_lora_adapter take any name; ours end up in headers and logs."""
    from types import SimpleNamespace

    async def scenario(server: PlayedServer) -> None:
        models = server.apis[0].app.state.openai_serving_models
        for name in (EVIL, "org/adapter", "é", "x" * 1000):
            models.lora_requests[name] = SimpleNamespace(lora_name=name, lora_path=str(tmp_path / "a1"), lora_int_id=1)
        server.config.write_text(server.config.read_text() + "# changed\n")
        await server.published._look()
        assert server.published.state.error is None
        assert server.front.known("org/adapter") is not None
        assert [server.front.known(name) for name in (EVIL, "é", "x" * 1000)] == [None] * 3

    played(scenario, recipe_file(tmp_path))


def test_no_line_break_or_control_character_reaches_a_log_or_a_message(tmp_path, caplog):
    config = recipe_file(tmp_path)
    document = yaml.safe_load(config.read_text())
    kinds = {
        "base": {"base_model_name_or_path": EVIL},
        "type": {"peft_type": EVIL},
        "revision": {"revision": EVIL, "base_model_name_or_path": EVIL},
        "field": {EVIL: EVIL},
        "pattern": {"rank_pattern": {EVIL: 4}},
        "targets": {"target_modules": [EVIL]},
        "alpha": {"lora_alpha": EVIL},
        "bias": {"bias": EVIL},
    }
    for kind, change in kinds.items():
        write_adapter(tmp_path / kind, 3)
        path = tmp_path / kind / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
        document["adapters"][kind] = {"path": f"./{kind}"}
    for kind, key in {"tensor": EVIL, "module": f"base_model.model.{EVIL}.lora_A.weight"}.items():
        write_adapter(tmp_path / kind, 3)
        save_file({key: torch.ones(4, 4)}, tmp_path / kind / "adapter_model.safetensors", metadata={EVIL: EVIL})
        document["adapters"][kind] = {"path": f"./{kind}"}
    config.write_text(yaml.safe_dump(document))

    async def scenario(server: PlayedServer) -> list[str]:
        said = []
        for name in [*kinds, "tensor", "module", EVIL, f"m0@{EVIL}", f"merge:linear({EVIL}=1,a1=1)"]:
            reply = await server.ask(name)
            assert reply.status_code in (200, 400, 404, 500)
            said += [reply.json().get("error", {}).get("message", ""), *reply.headers.values()]
        said += [str(await server.apis[0].client.get("/v1/merge/recipes", headers={"x-evil": "x"}))]
        rows = (await server.apis[0].client.get("/v1/merge/recipes")).json()["data"]
        return [*said, *(row["reason"] or "" for row in rows)]

    with caplog.at_level(logging.DEBUG, logger="vllm_merge"):
        said = played(scenario, config, ADHOC="on")
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("vllm_merge")]
    assert any("type" in line for line in ours), "something was logged"
    asked_for = {EVIL, f"m0@{EVIL}"}
    for line in [*ours, *said]:
        if any(name in line for name in asked_for) and "does not exist" in line:
            continue  # the played vLLM's own answer
        assert "\x1b" not in line, repr(line)
        assert "\x00" not in line, repr(line)
        assert not re.search(r"[\r\n\u2028]\s*(set-cookie|ERROR)", line), repr(line)


# -- what is private ------------------------------------------------------------------------------------------------------------


def test_sockets_and_alarms_are_the_users_alone(tmp_path):
    async def scenario(server: PlayedServer) -> None:
        folder = server.service._server.path.parent
        for path in folder.iterdir():
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path.name
        assert {path.suffix for path in folder.iterdir()} == {".sock", ".alarm"}

    played(scenario, recipe_file(tmp_path))


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o722])
def test_a_folder_for_sockets_that_others_may_write_to_is_refused(tmp_path, monkeypatch, mode):
    folder = tmp_path / "run"
    folder.mkdir()
    folder.chmod(mode)
    monkeypatch.setenv("VLLM_MERGE_RUNTIME_DIR", str(folder))
    with pytest.raises(ControlError, match="not this user's alone"):
        runtime_dir(create=True)
    monkeypatch.setenv("VLLM_MERGE_RUNTIME_DIR", str(tmp_path / "new" / "run"))
    made = runtime_dir(create=True)
    assert made is not None
    assert stat.S_IMODE(made.stat().st_mode) == 0o700


def test_the_token_is_in_no_log_and_no_answer(tmp_path, caplog):
    async def scenario(server: PlayedServer) -> None:
        replies = [
            await server.apis[0].client.request(method, filled(path, "m0"), headers={ADMIN_HEADER: TOKEN})
            for method, path in routes_of(server.apis[0].app)
            if not path.endswith("/events")
        ]
        assert all(TOKEN not in reply.text for reply in replies)

    with caplog.at_level(logging.DEBUG):
        played(scenario, recipe_file(tmp_path))
    assert TOKEN not in caplog.text


def test_messages_to_holders_of_the_key_name_no_folder(tmp_path, caplog):
    """Adapters that are cut, swapped and gone; a lost worker; a recipe file that is wrong."""
    files = tmp_path / "a hidden place" / "of adapters"
    files.mkdir(parents=True)
    arms = {"base": 50, "m4": 50}
    config = recipe_file(files, adapters=6, experiments={"trial": {"arms": arms, "unit": "user"}})
    write_adapter(files / "a5", 5)
    (files / "a5" / "adapter_model.safetensors").write_bytes(b"cut")  # before the start: m4 and m5 have no artifact

    async def scenario(server: PlayedServer) -> list[str]:
        client, said = server.apis[0].client, []

        async def ask(**more: Any) -> None:
            said.append((await client.post("/v1/completions", json={"prompt": "x", **more})).text)

        with server.apis[0].app.state.vllm_merge_events.listen() as events:
            write_adapter(files / "a0", 99)  # swapped after it was planned
            (files / "a3" / "adapter_model.safetensors").unlink()
            merges = [{"merge_method": "linear", "adapters": [{"adapter": a}, {"adapter": "a1"}]} for a in ("a0", "a3")]
            for name in ("m0", "m2", "m3", "m4", "m5", "a0", "a3", "a5", "assistant", "trial"):
                await ask(model=name, user="somebody")
                said.append((await client.post("/v1/merge/recipes/plan", json={"merge": name})).text)
            for merge in merges:
                await ask(model="m1", merge=merge)
                said.append((await client.post("/v1/merge/recipes/plan", json={"merge": merge})).text)
            document = yaml.safe_load(config.read_text())
            config.write_text(yaml.safe_dump({**document, "aliases": {"assistant": "nobody"}}))
            await server.published._look()
            for method, path in routes_of(server.apis[0].app):
                if method == "GET" and not path.endswith(("/events", "/download")):
                    for name in ("m0", "m3", "m5", "a0", "a5", "trial"):
                        said.append((await client.get(filled(path, name))).text)
            server.service.stop()
            await server.until(lambda: not server.front.connected)
            await ask(model="m1")
            said.append((await client.get("/v1/merge/artifacts")).text)
            while (event := await events.next(0.0)) is not None:
                said.append(event_routes.text(event))
        return said

    with caplog.at_level(logging.INFO):
        said = played(scenario, config, ADHOC="on", SOURCE_BYTES=0, DISK=str(files / "merges"))
    everything = "\n".join(said)
    messages = ("(…/a0): the content changed", "…/a3 has no", "…/adapter_model.safetensors: 3 bytes", "…/recipes.yaml:")
    for part in (*messages, "the worker at worker-1.sock is gone"):
        assert part in everything, part
    places = ("hidden", "place", "of adapters", str(tmp_path), tempfile.gettempdir())
    assert [line for line in said if any(place in line for place in places)] == []
    for name in ("a0", "a3", "a5"):
        assert str(files / name) in caplog.text, "whoever runs the server reads in its log which folder it is"


def test_a_message_in_a_stream_names_no_folder():
    """vLLM writes what is raised after a stream has begun into the stream."""

    async def scenario() -> None:
        @asynccontextmanager
        async def held() -> AsyncIterator[Any]:
            yield "the holder"
            raise ArtifactUnavailable("m0: the worker at /run/hidden/worker-1.sock is gone", retry=True, retry_after=7)

        assert told(None) is None
        lease = told(held())
        assert lease is not None
        with pytest.raises(ArtifactUnavailable) as caught:
            async with lease as holder:
                assert holder == "the holder"
        assert str(caught.value) == "m0: the worker at …/worker-1.sock is gone"
        assert (caught.value.retry, caught.value.retry_after) == (True, 7)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("message", "left"),
    [
        ("adapter 'a' (/srv/my models/a): changed", "adapter 'a' (…/a): changed"),
        (
            "[Errno 2] No such file: '/srv/x/adapter_model.safetensors'",
            "[Errno 2] No such file: '…/adapter_model.safetensors'",
        ),
        ("/srv/x because path:/srv/y/z", "…/x because path:…/z"),
        ("~/adapters/sql: no", "…/sql: no"),
        ("/secret: no", "…/secret: no"),
        ("send DELETE /v1/merge/recipes/m0", "send DELETE /v1/merge/recipes/m0"),
        ("yes/no, 1 / 2 at https://example.org/a/b", "yes/no, 1 / 2 at https://example.org/a/b"),
        ("/" + "a/" * 50_000, "…/"),
        ("/a b" * 50_000, "…/a b"),
    ],
)
def test_of_a_path_its_last_name_is_left(message, left):
    assert without_folders(message) == left


def test_pickle_and_code_are_never_read(tmp_path):
    from vllm_merge.errors import UserInputError

    write_adapter(tmp_path / "a", 1)
    (tmp_path / "a" / "adapter_model.safetensors").rename(tmp_path / "a" / "adapter_model.bin")
    with pytest.raises(UserInputError, match="pickle is never read"):
        read_adapter(tmp_path / "a")
