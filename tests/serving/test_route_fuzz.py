# SPDX-License-Identifier: Apache-2.0
"""Every route under /v1/merge does what /openapi.json says, whatever it is sent."""

import asyncio
import contextlib
import re
import socket
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="vLLM is not installed")
pytest.importorskip("schemathesis")

import uvicorn
from fastapi import FastAPI, HTTPException
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException

from tests.serving import played_server
from tests.serving.companions import accompany
from tests.serving.fuzzing import fuzz, operations
from tests.serving.played_server import environment, patched, played, recipe_file, write_adapter
from vllm_merge.serving.settings import ADAPTER_ROOT_VARIABLE

PAGE = Path(__file__).parents[2] / "docs" / "routes.md"
EXPERIMENT = {"arms": {"m0": 1, "m1": 1}, "unit": "user", "alias": "assistant"}
OF_EVERYBODY = ("/recipes/plan", "/recipes/validate", "/outcomes")  # that need no token, though they are posted


def answer_like_vllm(app) -> None:
    """vLLM answers what the framework refuses in OpenAI's shape."""

    async def refuse(request, error):
        status = 400 if isinstance(error, RequestValidationError) else error.status_code
        detail = {"message": "refused", "type": "refused", "param": None, "code": status}
        return JSONResponse({"error": detail}, status)

    for kind in (RequestValidationError, HTTPException, StarletteHTTPException):
        app.add_exception_handler(kind, refuse)


@contextlib.asynccontextmanager
async def serving(app):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning", lifespan="off"))
    running = asyncio.ensure_future(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        await running


def test_every_route_keeps_what_its_description_promises(tmp_path):
    config = recipe_file(tmp_path / "files", experiments={"greeting": EXPERIMENT})
    write_adapter(tmp_path / "root" / "fresh", 7)

    async def scenario(server):
        api = server.apis[0]
        answer_like_vllm(api.app)
        accompany(api, adhoc="on")
        async with serving(api.app) as url:
            found = await asyncio.to_thread(operations, url)
            assert len(found) >= 24
            for operation in found:
                assert await asyncio.to_thread(fuzz, operation) > 1
            assert (await api.ask("m0")).status_code == 200, "and the server serves"
        recipe_file(tmp_path / "files")  # without the experiment, which holds its arms
        await server.look()
        await server.idle()

    with environment(**{ADAPTER_ROOT_VARIABLE: str(tmp_path / "root")}), patched(played_server, SLOTS=4):
        played(scenario, config, STORE=tmp_path / "store.sqlite")


def test_the_fuzz_finds_a_route_that_promises_too_much():
    async def scenario():
        app = FastAPI()

        @app.get("/v1/merge/liar/{name}")
        async def liar(name: str) -> dict[str, int]:
            return JSONResponse({"message": "gone"}, 410) if name else {}

        async with serving(app) as url:
            (operation,) = await asyncio.to_thread(operations, url)
            with pytest.raises(BaseException, match="Undocumented status code"):
                await asyncio.to_thread(fuzz, operation)

    asyncio.run(scenario())


def test_every_route_is_described(tmp_path):
    """In /openapi.json, and in docs/routes.md."""
    config, shown = recipe_file(tmp_path), PAGE.read_text(encoding="utf-8")

    async def scenario(server):
        described = (await server.apis[0].client.get("/openapi.json")).json()
        for path, methods in described["paths"].items():
            if not path.startswith("/v1/merge/"):
                continue
            written = re.sub(r"\{\w+\}", "NAME", path.removeprefix("/v1/merge"))
            for method, operation in methods.items():
                where = f"{method} {path}"
                assert f"`{method.upper()} {written}`" in shown.replace("/ALIAS", "/NAME"), where
                assert operation["summary"], where
                assert operation["description"], where
                assert operation["tags"] == ["merge"], where
                good = operation["responses"]["200"]["content"]
                assert all(content.get("schema") for content in good.values()), where
                assert "400" in operation["responses"], where
                if method != "get" and not path.endswith(OF_EVERYBODY):
                    assert "403" in operation["responses"], where

    played(scenario, config)
