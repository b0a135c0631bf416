# SPDX-License-Identifier: Apache-2.0
"""vLLM's answer for a model that is not served names its base model alone: what is served beside it is added here."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from starlette.datastructures import MutableHeaders
from starlette.types import Message, Send

from vllm_merge.recipe.problems import listed, nearest


class UnknownName:
    """A send for a request whose model is none of ours. names(): what is served by us; not asked where it is not told."""

    def __init__(self, name: str, names: Callable[[], Sequence[str]], send: Send) -> None:
        self._name, self._names, self._send = name, names, send
        self._start: Message | None = None  # of an answer that may be changed: it says how long the body is

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] == 404:
            self._start = message
            return
        if self._start is not None:
            start, self._start = self._start, None
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                message = {**message, "body": self._told(message.get("body", b""))}
                headers = MutableHeaders(raw=list(start["headers"]))
                headers["content-length"] = str(len(message["body"]))
                start = {**start, "headers": headers.raw}
            await self._send(start)
        await self._send(message)

    def _told(self, body: bytes) -> bytes:
        """The body of an answer that the model does not exist, with the names that do; another as it is."""
        try:
            content = json.loads(body)
            said = content["error"]["message"]
        except (ValueError, KeyError, TypeError):
            return body
        if not isinstance(said, str) or f"`{self._name}`" not in said or not (names := self._names()):
            return body
        hint = nearest(self._name, names).replace(", did", " Did", 1)
        content["error"]["message"] = f"{said}{hint} Served by vllm-merge: {listed(names)}."
        return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
