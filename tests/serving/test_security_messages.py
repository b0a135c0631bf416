# SPDX-License-Identifier: Apache-2.0
"""What docs/security.md promises of messages, tried: no foreign line in a log, no folder in what users read."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="vLLM is not installed")

import torch
import yaml
from safetensors.torch import save_file

from tests.serving.played_server import PlayedServer, played, recipe_file, write_adapter
from tests.serving.test_security import filled, routes_of
from vllm_merge.serving.control.front import ArtifactUnavailable
from vllm_merge.serving.folders import without_folders
from vllm_merge.serving.requests.replies import told
from vllm_merge.serving.routes import event_routes

EVIL = "x\r\nset-cookie: a=b\x1b[2J\u2028\x00 ERROR root logged in"


def test_what_vllm_was_given_under_an_evil_name_stays_vllms(tmp_path):
    """--lora-modules and /v1/load_lora_adapter take any name; ours end up in headers and logs."""
    from types import SimpleNamespace

    async def scenario(server: PlayedServer) -> None:
        models = server.apis[0].app.state.openai_serving_models
        for name in (EVIL, "org/adapter", "é", "x" * 1000):
            models.lora_requests[name] = SimpleNamespace(lora_name=name, lora_path=str(tmp_path / "a1"), lora_int_id=1)
        server.config.write_text(server.config.read_text() + "# changed\n")
        await server.look()
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
            await server.look()
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
