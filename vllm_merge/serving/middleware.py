# SPDX-License-Identifier: Apache-2.0
"""What happens to a request for one of our names before vLLM sees it: it waits until its artifact is ready.

The name is replaced by the artifact's own (so that an alias that moves meanwhile cannot change what this request gets), and
the answer says in its headers which artifact gave it. Requests for other models pass through untouched. vLLM's API-key
check stands outside of this, so nobody without a key starts a merge.
"""

from __future__ import annotations

import json
import logging
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vllm_merge.serving.front import ArtifactUnavailable, FrontDoor

logger = logging.getLogger("vllm_merge")

ARTIFACT_HEADER = "x-vllm-merge-artifact"
NAME_HEADER = "x-vllm-merge-name"
RETRY_AFTER_SECONDS = 5

# What vLLM's API-key check covers in every version. Elsewhere (/pooling, /score, …) a request reaches its artifact through
# the engine client alone: it waits as well, without our headers.
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
        if not path.startswith(_GUARDED) or path.startswith(_NO_ENGINE):
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
        known = scope["app"].state.openai_serving_models.lora_requests
        try:
            while True:
                found, current = front.find(name), known.get(name)
                if found is None or current is None or not front.owns(current.lora_path):
                    return await self._app(scope, _replay(body, receive), send)  # or unloaded, or vLLM's own again
                artifact, label = found
                await front.ready(artifact)
                if label in known:
                    break  # else the recipe file has changed while this request waited
        except ArtifactUnavailable as error:
            return await _unavailable(name, error)(scope, receive, send)
        if name != label:
            request["model"] = label
            body = json.dumps(request).encode()
            scope = {**scope, "headers": _with_length(scope["headers"], len(body))}

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers[ARTIFACT_HEADER] = label
                headers[NAME_HEADER] = name
            await send(message)

        return await self._app(scope, _replay(body, receive), send_with_headers)


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
    headers = {"retry-after": str(RETRY_AFTER_SECONDS)} if error.retry else {"x-should-retry": "false"}
    return JSONResponse({"error": detail}, status_code=status, headers={**headers, NAME_HEADER: name})
