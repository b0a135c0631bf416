# SPDX-License-Identifier: Apache-2.0
"""Requests that this process makes to its own application, inside of all middleware: nobody is told of their answers."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.types import ASGIApp, Message, Scope

from vllm_merge.errors import MergeError
from vllm_merge.serving.requests import outcome
from vllm_merge.serving.requests.answers import AnswerFacts, Observed
from vllm_merge.serving.requests.outcome import Tape

TOP = 20  # tokens of a distribution that are asked for: what vLLM gives by default (--max-logprobs)
_COMPLETIONS = "/v1/completions"
_TOKEN = "token_id:"
# Of the client's request. What its headers say is for that request alone, and what routes leave behind is theirs.
_KEPT = ("type", "asgi", "http_version", "scheme", "server", "client", "root_path", "app", "state")


class CallFailed(MergeError):
    """The application did not answer as it was asked to."""


@dataclass
class Inside:
    """The application, as a request came to it."""

    app: ASGIApp
    scope: Scope

    @classmethod
    def of(cls, app: ASGIApp, scope: Scope) -> Inside:
        return cls(app, {key: scope[key] for key in _KEPT if key in scope})

    async def post(self, path: str, document: Mapping[str, Any], request_id: str) -> Answer:
        """Ask, and wait for the whole answer. Raises CallFailed, and whatever the application raises."""
        body = json.dumps(document).encode()
        headers = {"content-type": "application/json", "content-length": str(len(body)), "x-request-id": request_id}
        path = self.scope.get("root_path", "") + path
        scope = {
            **self.scope,
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [(key.encode(), value.encode()) for key, value in headers.items()],
        }
        result = outcome.begin()
        result.tape = Tape()
        answer = Answer(AnswerFacts("", "", "", "", path, time.monotonic(), time.time()), result.tape)
        observed = Observed(answer.facts, answer.take)
        asked = False

        async def receive() -> Message:
            nonlocal asked
            if asked:
                await asyncio.Event().wait()  # nobody leaves
            asked = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, receive, observed.send)
        observed.conclude(result)
        if answer.facts.status != 200 or answer.facts.error is not None:
            raise CallFailed(f"status {answer.facts.status}, {answer.facts.error or 'no answer'}")
        return answer

    async def distributions(
        self, model: str, tape: Tape, positions: Sequence[int], request_id: str, salt: str | None
    ) -> list[dict[int, float]]:
        """{token: ln of its probability} of the likeliest TOP tokens before each position of an answer.

        Each is asked for as the one token that follows prompt and answer so far, which the engine has in its prefix cache: what
        prompt_logprobs would give at once for all positions takes memory for prompt × vocabulary, which nobody set aside.
        """
        prompts = [tape.prompt + tape.answer[:position] for position in positions]
        wanted = {"max_tokens": 1, "temperature": 0, "logprobs": TOP, "return_tokens_as_token_ids": True}
        document = {"model": model, "prompt": prompts, **wanted, **({"cache_salt": salt} if salt is not None else {})}
        answer = await self.post(_COMPLETIONS, document, request_id)
        try:
            choices = sorted(json.loads(answer.body)["choices"], key=lambda choice: choice["index"])
            tops = [choice["logprobs"]["top_logprobs"][0] for choice in choices]
            found = [{int(token.removeprefix(_TOKEN)): float(value) for token, value in top.items()} for top in tops]
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            raise CallFailed("an answer without logprobs") from None
        if len(found) != len(positions):
            raise CallFailed(f"{len(found)} of {len(positions)} distributions")
        return found


@dataclass
class Answer:
    """facts: times and status; tape: tokens; body: everything that was sent."""

    facts: AnswerFacts
    tape: Tape
    body: bytearray = field(default_factory=bytearray)

    async def take(self, message: Message) -> None:
        if message["type"] == "http.response.body":
            self.body += message.get("body", b"")
