# SPDX-License-Identifier: Apache-2.0
"""Answers from a server with OpenAI's interface."""

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from vllm_merge.errors import MergeError, UserInputError

KEY_VARIABLES = ("OPENAI_API_KEY", "VLLM_API_KEY")
AT_ONCE = 8  # requests
TIMEOUT_SECONDS = 120.0
PATIENCE_SECONDS = 300.0  # how long a server may say that it is busy, as while it merges a lazy recipe


@dataclass
class Server:
    """A server at `url`, with or without the /v1 at its end. chat: prompts are messages of a user."""

    url: str
    max_tokens: int
    chat: bool = False
    _base: str = field(init=False)

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise UserInputError(f"--server {self.url}: is not a URL; expected something like http://localhost:8000")
        self._base = self.url.rstrip("/").removesuffix("/v1") + "/v1"

    def models(self) -> dict[str, str | None]:
        """The names that are served, each with its parent (None for a base model)."""
        data = self._call("/models").get("data")
        if not isinstance(data, list):
            raise UserInputError(f"--server {self.url}: /v1/models is not a list of models; is this an OpenAI server?")
        return {str(card["id"]): card.get("parent") for card in data}

    def answers(self, name: str, prompts: Sequence[str], progress: Callable[[int], None]) -> list[str]:
        """The greedy answer of model `name` to each prompt; progress(answers so far)."""
        found = []
        with ThreadPoolExecutor(AT_ONCE) as pool:
            try:
                for text in pool.map(lambda prompt: self._answer(name, prompt), prompts):
                    found.append(text)
                    progress(len(found))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return found

    def _answer(self, name: str, prompt: str) -> str:
        common = {"model": name, "max_tokens": self.max_tokens, "temperature": 0}
        try:
            if self.chat:
                messages = [{"role": "user", "content": prompt}]
                reply = self._call("/chat/completions", {**common, "messages": messages})
                return str(reply["choices"][0]["message"]["content"] or "")
            return str(self._call("/completions", {**common, "prompt": prompt})["choices"][0]["text"])
        except (KeyError, IndexError, TypeError):
            raise MergeError(f"--server {self.url}: the answer of {name!r} is not one of OpenAI's interface") from None

    def _call(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                with urllib.request.urlopen(self._request(path, body), timeout=TIMEOUT_SECONDS) as reply:
                    found = json.loads(reply.read())
                if not isinstance(found, dict):
                    raise ValueError("not an object")
                return found
            except urllib.error.HTTPError as error:
                wait = _seconds(error.headers.get("Retry-After"))
                if error.code not in (429, 503) or time.monotonic() + wait > deadline:
                    raise MergeError(f"--server {self.url}: {path}: {error.code}: {_reason(error)}") from None
                time.sleep(wait)
            except urllib.error.URLError as error:
                raise UserInputError(
                    f"--server {self.url}: cannot be reached: {getattr(error.reason, 'strerror', None) or error.reason}"
                ) from None
            except (TimeoutError, ConnectionError) as error:
                raise MergeError(f"--server {self.url}: {path}: {error or 'timed out'}") from None
            except ValueError:
                raise MergeError(
                    f"--server {self.url}: {path}: the answer is not JSON; is this an OpenAI server?"
                ) from None

    def _request(self, path: str, body: dict[str, Any] | None) -> urllib.request.Request:
        headers = {"Content-Type": "application/json"}
        key = next((os.environ[name] for name in KEY_VARIABLES if os.environ.get(name)), None)
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        return urllib.request.Request(self._base + path, data=data, headers=headers)


def _seconds(header: str | None) -> float:
    try:
        return min(max(float(header or 1), 0.1), 30.0)
    except ValueError:  # a date
        return 5.0


def _reason(error: urllib.error.HTTPError) -> str:
    """The server's own words, if it has any."""
    raw = error.read(10_000)
    try:
        found = json.loads(raw)
        said = found.get("error", found)
        return str(said.get("message", said) if isinstance(said, dict) else said)[:500]
    except (ValueError, AttributeError):
        return raw.decode(errors="replace").strip()[:200] or str(error.reason)
