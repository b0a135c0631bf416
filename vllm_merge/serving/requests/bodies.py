# SPDX-License-Identifier: Apache-2.0
"""Reading a request's body before the application does, and handing it on."""

from __future__ import annotations

import json
from typing import Any

from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope

_REQUEST_ID = b"x-request-id"
# On SageMaker's route a header names the adapter, and vLLM puts it in the place of the body's `model`, which counts for nothing.
_SAGEMAKERS_ROUTE = "/invocations"
_SAGEMAKERS_HEADER = "x-amzn-sagemaker-adapter-identifier"


class Asked:
    """A request whose body has been read. `scope` and `receive` are what the application gets, which reads it again.

    document: the JSON object in the body; None for anything else, which vLLM then answers as it always does.
    """

    def __init__(self, scope: Scope, receive: Receive, body: bytes) -> None:
        self.scope = scope
        self.document = _parse(body)
        self._by_header = scope["path"].removeprefix(scope.get("root_path", "")) == _SAGEMAKERS_ROUTE
        self._body = body
        self._receive = receive
        self._sent = False

    @property
    def model(self) -> str | None:
        """The model that is asked for."""
        if self._by_header:
            return Headers(scope=self.scope).get(_SAGEMAKERS_HEADER)
        name = self.document.get("model") if self.document is not None else None
        return name if isinstance(name, str) else None

    @property
    def size(self) -> int:
        """Bytes of the body."""
        return len(self._body)

    def rename(self, model: str) -> None:
        """Ask for another model instead."""
        if model == self.model:
            return
        if self._by_header:
            header = _SAGEMAKERS_HEADER.encode()
            kept = [(key, value) for key, value in self.scope["headers"] if key.lower() != header]
            self.scope = {**self.scope, "headers": [*kept, (header, model.encode())]}
            return
        assert self.document is not None
        self.replace({**self.document, "model": model})

    def replace(self, document: dict[str, Any]) -> None:
        """Let the application read this document."""
        self.document, self._body = document, json.dumps(document).encode()
        kept = [(key, value) for key, value in self.scope["headers"] if key.lower() != b"content-length"]
        self.scope = {**self.scope, "headers": [*kept, (b"content-length", str(len(self._body)).encode())]}

    def tag(self, request_id: str) -> None:
        """Let vLLM use this in the response's id, unless the client chose an id itself."""
        headers = self.scope["headers"]
        if not any(key.lower() == _REQUEST_ID for key, _ in headers):
            self.scope = {**self.scope, "headers": [*headers, (_REQUEST_ID, request_id.encode())]}

    async def receive(self) -> Message:
        """The body, and then whatever comes after it (a disconnect)."""
        if self._sent:
            return await self._receive()
        self._sent = True
        return {"type": "http.request", "body": self._body, "more_body": False}


async def read_body(receive: Receive) -> bytes | None:
    """The whole body; None if the client left before its end."""
    chunks = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        chunks.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(chunks)


def _parse(body: bytes) -> dict[str, Any] | None:
    try:
        parsed = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return parsed if isinstance(parsed, dict) else None
