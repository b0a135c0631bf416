# SPDX-License-Identifier: Apache-2.0
"""What became of every request for a name of ours, as its client saw it; for metrics and for exposures of experiments.

Times are taken where the answer's bytes are handed to the server. Tokens are those of the answer's own `usage` where it has
one, else those that the engine gave (outcome.py): never a count of chunks, since one chunk may hold several tokens.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers
from starlette.types import Message, Send

from vllm_merge.serving.requests.openings import Opening
from vllm_merge.serving.requests.outcome import Outcome

if TYPE_CHECKING:
    from vllm_merge.serving.experiments.experiments import Chosen

logger = logging.getLogger("vllm_merge")

MAX_GAPS = 4096  # of one stream that are kept
_TAIL_BYTES = 64 << 10  # of an answer, where its usage is looked for
_USAGE = b'"usage":'  # cannot stand inside a JSON string, where the second quote has a backslash
_SSE_ERROR = re.compile(rb'^(?:event: error\s+)?data: ?\{"(?:error"|type": ?"error")')
# A string that is not empty under one of the keys that hold what a model wrote, on any of vLLM's routes.
_CONTENT = re.compile(
    rb'"(?:text|content|reasoning|reasoning_content|delta|arguments|partial_json|thinking)": ?"[^"]|"token_ids": ?\[\d'
)


@dataclass
class AnswerFacts:
    """name: as asked. kind: recipe | alias | adapter | adhoc | experiment. label: recipe@digest12 of what answers, "" if
    none. recipe: a label for metrics, from the recipe file or "adhoc". route: a path template.

    started: time.monotonic(); wall: time.time(). first_token: seconds from `started` to the first piece of a stream that
    carries content, None for other answers. gaps: seconds between such pieces, the first MAX_GAPS. seconds: the whole.
    fallback: the artifact it stood in for. error: a word for what went wrong, None if nothing did. chosen: what an experiment
    chose; refused: the answer begins like a refusal, which only answers of experiments are looked at for.
    """

    name: str
    kind: str
    label: str
    recipe: str
    route: str
    started: float
    wall: float
    experiment: str = ""
    arm: str = ""
    reason: str = ""
    fallback: str = ""
    status: int = 0
    streaming: bool = False
    first_token: float | None = None
    gaps: list[float] = field(default_factory=list)
    seconds: float = 0.0
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    finish: str | None = None
    error: str | None = None
    chosen: Chosen | None = None
    refused: bool = False


_subscribers: list[Callable[[AnswerFacts], None]] = []


def subscribe(callback: Callable[[AnswerFacts], None]) -> Callable[[], None]:
    """Call `callback` once for every request, when its answer has ended or its client left. It must be cheap.

    Returns what ends the subscription.
    """
    _subscribers.append(callback)
    return lambda: _subscribers.remove(callback)


class Observed:
    """A send that watches the answer go by."""

    def __init__(self, facts: AnswerFacts, send: Send) -> None:
        self.facts = facts
        self._send = send
        self._last = 0.0  # when the latest piece with content went by
        self._tail = b""
        self._complete = False
        self._opening = Opening()

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.facts.status = message["status"]
            content_type = Headers(raw=message["headers"]).get("content-type", "")
            self.facts.streaming = content_type.startswith("text/event-stream")
        elif message["type"] == "http.response.body":
            self._look(message.get("body", b""))
            self._complete = not message.get("more_body", False)
        await self._send(message)

    def _look(self, body: bytes) -> None:
        facts = self.facts
        if facts.chosen is not None:
            self._opening.look(body)
        if not facts.streaming:
            self._tail = (self._tail + body)[-_TAIL_BYTES:]
        elif _CONTENT.search(body):
            now = time.monotonic()
            if facts.first_token is None:
                facts.first_token = now - facts.started
            elif len(facts.gaps) < MAX_GAPS:
                facts.gaps.append(now - self._last)
            self._last = now
        elif _SSE_ERROR.match(body):
            facts.error = "stream_error"
        if facts.streaming and _USAGE in body:
            self._tail = body

    def end(self, outcome: Outcome) -> None:
        """Tell the subscribers. To be called once, when nothing more will be sent."""
        self.conclude(outcome)
        for callback in list(_subscribers):
            try:
                callback(self.facts)
            except Exception:  # an answer never fails for what is done with its facts
                logger.exception("what was to be noted of an answer is lost")

    def conclude(self, outcome: Outcome) -> None:
        """Complete the facts."""
        facts = self.facts
        facts.seconds = time.monotonic() - facts.started
        facts.label = facts.label or outcome.label or ""
        facts.finish = outcome.finish
        facts.refused = self._opening.refuses
        usage = _value_after(self._tail, _USAGE) or {}
        facts.prompt_tokens = _count(usage, "prompt_tokens", "input_tokens", otherwise=outcome.prompt_tokens)
        facts.completion_tokens = _count(
            usage, "completion_tokens", "output_tokens", otherwise=outcome.completion_tokens
        )
        if not self._complete:
            facts.error = "client_left" if facts.error is None and outcome.error is None else facts.error or "failed"
        elif facts.status >= 400:
            facts.error = _error_type(self._tail) or f"http_{facts.status}"


def _count(usage: dict[str, Any], *keys: str, otherwise: int | None) -> int | None:
    return next((usage[key] for key in keys if isinstance(usage.get(key), int)), otherwise)


def _value_after(body: bytes, key: bytes) -> dict[str, Any] | None:
    """The JSON object that follows the last `key`; None if there is none."""
    _, found, rest = body.rpartition(key)
    if not found:
        return None
    try:
        value = json.JSONDecoder().raw_decode(rest.decode(errors="replace").lstrip())[0]
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _error_type(body: bytes) -> str | None:
    """OpenAI's error type, or the class of vLLM's."""
    detail = _value_after(body, b'"error":')
    kind = detail.get("type") if detail is not None else None
    return kind if isinstance(kind, str) and len(kind) <= 64 else None
