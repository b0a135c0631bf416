# SPDX-License-Identifier: Apache-2.0
"""Requests to a server with OpenAI's interface: counted, paced, and made again where it says that it is busy."""

from __future__ import annotations

import http.client
import json
import os
import threading
import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote, urlsplit

from vllm_merge.errors import MergeError, UserInputError
from vllm_merge.evaluation.server import KEY_VARIABLES, PATIENCE_SECONDS, TIMEOUT_SECONDS
from vllm_merge.search.budget import Budget
from vllm_merge.search.pace import Pace

BUSY = (429, 503)
LONGEST_WAIT = 60.0  # seconds, whatever Retry-After says
MERGE_SECONDS = 660.0  # that a request which has something merged may take
TRIES = 2  # of a connection that the server closed meanwhile


class Refused(MergeError):
    """The server answered with an error. status: of HTTP."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Endpoint:
    """The server at `url`, with or without the /v1 at its end. Safe to use from several threads."""

    def __init__(
        self,
        url: str,
        budget: Budget,
        at_once: int,
        *,
        option: str = "--server",
        keys: Sequence[str] = KEY_VARIABLES,
    ) -> None:
        """option: what the URL came from, for messages. keys: variables of the environment, the first that is set is the key."""
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1:
            raise UserInputError(f"{option} {url}: is not a URL; expected something like http://localhost:8000")
        self._what = f"{option} {url}"
        self._path = parts.path.rstrip("/").removesuffix("/v1") + "/v1"
        self._secure, self._host, self._port = parts.scheme == "https", parts.hostname, port
        key = next((os.environ[name] for name in keys if os.environ.get(name)), None)
        self._headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        self._budget, self._own = budget, threading.local()
        self.pace = Pace(at_once, budget.check)

    def get(self, path: str) -> dict[str, Any]:
        """The answer to a GET, which is not counted. Raises Refused, MergeError, UserInputError where nobody listens."""
        status, _, raw = self._send("GET", path, None)
        return self._read(status, raw, path)

    def post(self, path: str, body: dict[str, Any], *, alone: bool = False) -> dict[str, Any]:
        """The answer to a POST of `body`, which is counted.

        Where the server is busy (429, 503) the request is made again when it says, for some minutes; meanwhile no other is, but
        those that run; alone: only this one waits. Raises Refused, MergeError, Ended, UserInputError where nobody listens.
        """
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            with self.pace.turn():
                self._budget.take()
                seconds = MERGE_SECONDS if alone else TIMEOUT_SECONDS
                status, after, raw = self._send("POST", path, json.dumps(body).encode(), seconds)
            if status not in BUSY:
                self.pace.answered()
                return self._read(status, raw, path)
            self._budget.give_back()
            wait = _seconds(after)
            if time.monotonic() + wait > deadline:
                return self._read(status, raw, path)
            if alone:
                self.pace.wait(wait)
            else:
                self.pace.refused(wait)

    def _send(
        self, method: str, path: str, body: bytes | None, seconds: float = TIMEOUT_SECONDS
    ) -> tuple[int, str | None, bytes]:
        """Status, Retry-After and body. The connection is kept for the thread's next request."""
        for attempt in range(TRIES):
            connection: http.client.HTTPConnection | None = getattr(self._own, "connection", None)
            kept = connection is not None
            if connection is None:
                kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
                connection = self._own.connection = kind(self._host, self._port)
            connection.timeout = seconds
            if connection.sock is not None:
                connection.sock.settimeout(seconds)
            try:
                connection.request(method, self._path + quote(path), body, self._headers)
                reply = connection.getresponse()
                return reply.status, reply.getheader("Retry-After"), reply.read()
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                self._own.connection = None
                if isinstance(error, TimeoutError):
                    raise MergeError(f"{self._what}: {path}: no answer within {seconds:.0f} s") from None
                if kept and attempt + 1 < TRIES:
                    continue  # it had been closed meanwhile
                reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
                raise UserInputError(f"{self._what}: cannot be reached: {reason}") from None
        raise AssertionError("the last try returns or raises")

    def _read(self, status: int, raw: bytes, path: str) -> dict[str, Any]:
        try:
            found = json.loads(raw)
        except ValueError:
            found = None
        if status >= 400:
            said = found.get("error", found) if isinstance(found, dict) else None
            text = said.get("message", said) if isinstance(said, dict) else said
            text = str(text)[:500] if text else raw[:200].decode(errors="replace").strip()
            raise Refused(f"{self._what}: {path}: {status}: {text}", status)
        if not isinstance(found, dict):
            raise MergeError(f"{self._what}: {path}: the answer is not JSON; is this an OpenAI server?")
        return found


def _seconds(header: str | None) -> float:
    try:
        return min(max(float(header or 1), 0.1), LONGEST_WAIT)
    except ValueError:  # a date
        return 5.0
