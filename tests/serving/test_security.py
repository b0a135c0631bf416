# SPDX-License-Identifier: Apache-2.0
"""What docs/security.md promises of routes, tried: without the token, in floods, with bodies that are wrong on purpose."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="vLLM is not installed")

import yaml
from fastapi import FastAPI

from tests.serving.played_server import TOKEN, PlayedServer, environment, leftovers, played, recipe_file
from vllm_merge.serving.plugin import CONFIG_VARIABLE, MergeEndpoints
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
