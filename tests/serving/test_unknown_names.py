# SPDX-License-Identifier: Apache-2.0
"""The answer to a request for a model that nobody serves: vLLM's, and the names that are served here."""

import asyncio

import httpx
import pytest

pytest.importorskip("fastapi", reason="vLLM is not installed")

from starlette.responses import JSONResponse, Response, StreamingResponse

from tests.serving.played_server import BASE, played, recipe_file
from vllm_merge.serving.requests.unknown import UnknownName

NAMES = ["support", "assistant", "sql"]
SAID = "The model `suport` does not exist. Valid aliases: base."
IN_PIECES = f'{{"error": {{"message": "{SAID}"}}}}'
OTHERS = {
    "another route": JSONResponse({"detail": "Not Found"}, 404),
    "something else that is not there": JSONResponse({"error": {"message": "Response `r` not found."}}, 404),
    "no text": JSONResponse({"error": {"message": None}}, 404),
    "no error": JSONResponse(["suport"], 404),
    "no JSON": Response("no `suport`", 404),
    "nothing": Response(b"", 404),
    "another status": JSONResponse({"error": {"message": SAID}}, 400),
    "in pieces": StreamingResponse(iter([IN_PIECES[:30], IN_PIECES[30:]]), 404),
}


def answer(response: Response, names: list[str] = NAMES, name: str = "suport") -> httpx.Response:
    async def app(scope, receive, send):
        await response(scope, receive, UnknownName(name, lambda: names, send).send)

    async def talk() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            return await client.post("/v1/completions")

    return asyncio.run(talk())


def test_what_is_served_and_the_nearest_name_are_added() -> None:
    """And nothing else is changed: the type, the field and further headers stay."""
    detail = {"message": SAID, "type": "NotFoundError", "param": "model", "code": 404}
    got = answer(JSONResponse({"error": detail}, 404, {"x-request-id": "7"}))
    told = f"{SAID} Did you mean 'support'? Served by vllm-merge: support, assistant, sql."
    assert (got.status_code, got.headers["x-request-id"]) == (404, "7")
    assert got.json() == {"error": {**detail, "message": told}}
    assert int(got.headers["content-length"]) == len(got.content)


def test_of_many_names_some_are_said() -> None:
    names = [f"name{index}" for index in range(1000)]
    got = answer(JSONResponse({"error": {"message": SAID.replace("suport", "x" * 5000)}}, 404), names, "x" * 5000)
    assert got.json()["error"]["message"].endswith("name14, name15 and 984 more.")
    assert "Did you mean" not in got.text


@pytest.mark.parametrize("what", OTHERS)
def test_other_answers_pass_as_they_are(what: str) -> None:
    got = answer(OTHERS[what])
    assert got.status_code == OTHERS[what].status_code
    assert got.text == (IN_PIECES if what == "in pieces" else OTHERS[what].body.decode())
    assert int(got.headers.get("content-length", len(got.content))) == len(got.content)


def test_without_names_nothing_is_added() -> None:
    assert answer(JSONResponse({"error": {"message": SAID}}, 404), []).json() == {"error": {"message": SAID}}


def test_on_a_server(tmp_path) -> None:
    """The names of adapters come last, and what requests have made stays theirs."""

    async def scenario(server):
        answer = await server.ask("asistant")
        assert answer.status_code == 404
        message = answer.json()["error"]["message"]
        assert message.startswith(
            "The model `asistant` does not exist. Did you mean 'assistant'? Served by vllm-merge: "
        )
        names = message.rpartition(": ")[2].removesuffix(".").split(", ")
        kinds = [server.front.names[name].kind for name in names if name in server.front.names]
        assert kinds == sorted(kinds, key=lambda kind: kind == "adapter")
        assert {"m0", "assistant"} <= set(names)
        assert (await server.ask(BASE)).status_code == 200
        assert (await server.ask("m0")).status_code == 200

    played(scenario, recipe_file(tmp_path / "files"))
