# SPDX-License-Identifier: Apache-2.0
"""What happens to a request for one of our names before vLLM sees it: it waits until its artifact is ready.

The name is replaced by the artifact's own (so that an alias that moves meanwhile cannot change what this request gets), the
artifact is leased until the answer is sent, and the answer says in its headers which artifact gave it. Requests for other
models pass through untouched. vLLM's API-key check stands outside of this, so nobody without a key starts a merge.
"""

from __future__ import annotations

import json
import logging
from contextlib import AsyncExitStack
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vllm_merge.serving import outcome
from vllm_merge.serving.front import ArtifactUnavailable, FrontDoor
from vllm_merge.serving.misses import Served, hold

logger = logging.getLogger("vllm_merge")

ARTIFACT_HEADER = "x-vllm-merge-artifact"
NAME_HEADER = "x-vllm-merge-name"
FALLBACK_HEADER = "x-vllm-merge-fallback"  # the artifact that a stand-in answers for
RETRY_AFTER_SECONDS = 5  # where the reason does not tell

# What vLLM's API-key check covers in every version. Elsewhere (/pooling, /score, …) nothing of ours happens before vLLM has
# let the request through: it reaches its artifact through the engine client, waits there, and is answered alike.
_GUARDED = ("/v1/", "/v2/", "/inference/")
# Routes under these that take a model name but run nothing.
_NO_ENGINE = ("/v1/merge/", "/v1/load_lora_adapter", "/v1/unload_lora_adapter")


class MergeMiddleware:
    """Pure ASGI. `app.state.vllm_merge` holds the FrontDoor once the server's state is set up."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self._app(scope, receive, send)
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if path.startswith(_NO_ENGINE):
            return await self._app(scope, receive, send)
        front: FrontDoor | None = getattr(scope["app"].state, "vllm_merge", None)
        if front is None or "json" not in Headers(scope=scope).get("content-type", "json"):
            return await self._app(scope, receive, send)
        body, disconnected = await _read_body(receive)
        if disconnected:
            return None
        request = _parse(body)
        name = request.get("model") if request is not None else None
        if request is None or not isinstance(name, str):
            return await self._app(scope, _replay(body, receive), send)
        answer = _Answer(name, outcome.begin(), scope, receive, send)
        if not path.startswith(_GUARDED):
            return await self._app(scope, _replay(body, receive), answer.send)
        models = scope["app"].state.openai_serving_models
        async with AsyncExitStack() as leases:
            while True:
                known, current = front.known(name), models.lora_requests.get(name)
                unloaded = current is None or not front.owns(current.lora_path)  # or vLLM's own again
                if known is None or (known.digest is not None and unloaded):
                    return await self._app(scope, _replay(body, receive), send)
                try:
                    served = await hold(front, name, models.base_model_paths[0].name, leases)
                except ArtifactUnavailable as error:
                    return await _unavailable(name, error)(scope, receive, send)
                if served.instead_of or served.label in models.lora_requests:
                    break  # else the recipe file has changed while this request waited
                await leases.aclose()
            answer.use(served)
            if name != served.label:
                request["model"] = served.label
                body = json.dumps(request).encode()
                scope = {**scope, "headers": _with_length(scope["headers"], len(body))}
            return await self._app(scope, _replay(body, receive), answer.send)


class _Answer:
    """Sends a request's answer with our headers; one that failed for want of its artifact becomes a 503 or 500 that says so."""

    def __init__(self, name: str, result: outcome.Outcome, scope: Scope, receive: Receive, send: Send) -> None:
        self.served: Served | None = None
        self._name, self._result = name, result
        self._scope, self._receive, self._send = scope, receive, send
        self._replaced = False

    def use(self, served: Served) -> None:
        """Who answers; what went wrong before that was settled is forgotten."""
        self.served, self._result.error = served, None

    async def send(self, message: Message) -> None:
        if self._replaced:
            return
        error = self._result.error
        if message["type"] == "http.response.start":
            if isinstance(error, ArtifactUnavailable) and message["status"] >= 400:
                self._replaced = True
                await _unavailable(self._name, error)(self._scope, self._receive, self._send)
                return
            headers = MutableHeaders(scope=message)
            served = self.served or (Served(self._result.label) if self._result.label else None)
            if served is not None:
                headers[ARTIFACT_HEADER] = served.label
                headers[NAME_HEADER] = self._name
                if served.instead_of is not None:
                    headers[FALLBACK_HEADER] = served.instead_of
        await self._send(message)


async def _read_body(receive: Receive) -> tuple[bytes, bool]:
    """The whole body, and whether the client left before its end."""
    chunks = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return b"", True
        chunks.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(chunks), False


def _parse(body: bytes) -> dict[str, Any] | None:
    """The JSON object in the body; None for anything else, which vLLM then answers as it always does."""
    try:
        parsed = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return parsed if isinstance(parsed, dict) else None


def _replay(body: bytes, receive: Receive) -> Receive:
    """A receive that gives the body that was read, and then whatever comes after it (a disconnect)."""
    sent = False

    async def replay() -> Message:
        nonlocal sent
        if not sent:
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return replay


def _with_length(headers: list[tuple[bytes, bytes]], length: int) -> list[tuple[bytes, bytes]]:
    kept = [(key, value) for key, value in headers if key.lower() != b"content-length"]
    return [*kept, (b"content-length", str(length).encode())]


def _unavailable(name: str, error: ArtifactUnavailable) -> JSONResponse:
    """OpenAI's error shape: 503 with Retry-After if asking again may help, else 500 that its client does not retry."""
    status = 503 if error.retry else 500
    kind = "merge_unavailable" if error.retry else "merge_failed"
    detail = {
        "message": f"The model `{name}` cannot be served: {error}",
        "type": kind,
        "param": "model",
        "code": status,
    }
    seconds = error.retry_after or RETRY_AFTER_SECONDS
    headers = {"retry-after": str(seconds)} if error.retry else {"x-should-retry": "false"}
    return JSONResponse({"error": detail}, status_code=status, headers={**headers, NAME_HEADER: name})
