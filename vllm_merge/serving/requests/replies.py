# SPDX-License-Identifier: Apache-2.0
"""Our headers on an answer, and the answer to a request whose artifact cannot be served."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from starlette.datastructures import MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import Message, Send

from vllm_merge.recipe.schema import BASE
from vllm_merge.serving.control.front import ArtifactUnavailable, Holder
from vllm_merge.serving.experiments.experiments import Chosen
from vllm_merge.serving.experiments.exposures import ARTIFACT_HEADER, headers_of, trace
from vllm_merge.serving.folders import without_folders
from vllm_merge.serving.requests.answers import AnswerFacts
from vllm_merge.serving.requests.bodies import Asked
from vllm_merge.serving.requests.misses import Served
from vllm_merge.serving.requests.outcome import Outcome

NAME_HEADER = "x-vllm-merge-name"
FALLBACK_HEADER = "x-vllm-merge-fallback"  # the artifact that a stand-in answers for
RETRY_AFTER_SECONDS = 5  # where the reason does not tell


def told(held: AbstractAsyncContextManager[Holder] | None) -> AbstractAsyncContextManager[Holder] | None:
    """A lease whose errors clients may read: vLLM writes them into a stream that has begun."""
    return None if held is None else _told(held)


@asynccontextmanager
async def _told(held: AbstractAsyncContextManager[Holder]) -> AsyncIterator[Holder]:
    try:
        async with held as holder:
            yield holder
    except ArtifactUnavailable as error:
        message = without_folders(str(error))
        raise ArtifactUnavailable(message, retry=error.retry, retry_after=error.retry_after) from None


class Reply:
    """Sends a request's answer with our headers; one that failed for want of its artifact becomes a 503 or 500 that says so.

    headers: further ones for every answer to this request.
    """

    def __init__(self, asked: Asked, facts: AnswerFacts, result: Outcome, send: Send) -> None:
        self.facts = facts
        self.headers: dict[str, str] = {}
        self._asked, self._result, self._send = asked, result, send
        self._served: Served | None = None
        self._replaced = False

    def use(self, served: Served) -> None:
        """Who answers; what went wrong before that was settled is forgotten."""
        self._served, self._result.error = served, None
        self.facts.label, self.facts.fallback = served.label, served.instead_of or ""

    def choose(self, chosen: Chosen) -> None:
        """An experiment has chosen who answers."""
        facts, found, ticket = self.facts, chosen.assignment, chosen.ticket()
        facts.chosen, facts.kind, facts.label = chosen, "experiment", chosen.artifact
        facts.experiment, facts.arm, facts.reason = found.flag_key, found.variant, found.reason
        facts.recipe = chosen.serve or BASE
        self.headers = headers_of(chosen, ticket)
        self._asked.tag(ticket)
        trace(chosen, facts.name)

    async def send(self, message: Message) -> None:
        if self._replaced:
            return
        error = self._result.error
        if message["type"] == "http.response.start":
            if isinstance(error, ArtifactUnavailable) and message["status"] >= 400:
                await self.unavailable(error)
                return
            headers = MutableHeaders(scope=message)
            served = self._served or (Served(self._result.label) if self._result.label else None)
            if served is not None:
                headers[ARTIFACT_HEADER] = served.label
            if served is not None or self.facts.chosen is not None:
                headers[NAME_HEADER] = self.facts.name
            if served is not None and served.instead_of is not None:
                headers[FALLBACK_HEADER] = served.instead_of
            headers.update({key: value for key, value in self.headers.items() if key not in headers})
        await self._send(message)

    async def unavailable(self, error: ArtifactUnavailable) -> None:
        """OpenAI's error shape: 503 with Retry-After if asking again may help, else 500 that its client does not retry."""
        self._replaced = True
        status = 503 if error.retry else 500
        detail = {
            "message": f"The model `{self.facts.name}` cannot be served: {without_folders(str(error))}",
            "type": "merge_unavailable" if error.retry else "merge_failed",
            "param": "model",
            "code": status,
        }
        seconds = error.retry_after or RETRY_AFTER_SECONDS
        headers = {"retry-after": str(seconds)} if error.retry else {"x-should-retry": "false"}
        headers = {**headers, **self.headers, NAME_HEADER: self.facts.name}
        await JSONResponse({"error": detail}, status, headers)(self._asked.scope, self._asked.receive, self._send)
