# SPDX-License-Identifier: Apache-2.0
"""POST /v1/merge/outcomes: what came of answers, from whoever may ask for answers. A 2xx says that it is on disk."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from vllm_merge.experiments.commits import OutcomeCommits
from vllm_merge.experiments.outcome_rows import FIELDS, MOST_ROWS, WrongOutcome, read_outcomes
from vllm_merge.experiments.store import Store, StoreError
from vllm_merge.serving.routes.route_errors import RouteError, errors

router = APIRouter(prefix="/v1/merge", tags=["merge"])

MOST_BYTES = 1 << 20  # of a request
RATE = 2000.0  # outcomes a second that an API process takes
BURST = 10_000.0

_TEXT, _NUMBER = {"type": "string", "maxLength": 512}, {"type": "number"}
_OUTCOME = {
    "type": "object",
    "additionalProperties": False,
    "properties": dict.fromkeys(FIELDS, _TEXT)
    | {"score": _NUMBER, "thumb": {"enum": ["up", "down", True, False]}, "at": {"anyOf": [_TEXT, _NUMBER]}},
}
_MANY = {
    "type": "object",
    "additionalProperties": False,
    "required": ["outcomes"],
    "properties": {"outcomes": {"type": "array", "minItems": 1, "maxItems": MOST_ROWS, "items": _OUTCOME}},
}
# The body is read by hand, with a bound on its bytes; this is for the route's documentation.
_BODY = {"requestBody": {"required": True, "content": {"application/json": {"schema": {"anyOf": [_OUTCOME, _MANY]}}}}}


class OutcomeDesk:
    """Takes outcomes for one API process, no faster than it should.

    store: gives the store of experiments; None while there are none.
    """

    def __init__(self, store: Callable[[], Store | None]) -> None:
        self._store = store
        self._commits: OutcomeCommits | None = None
        self._left, self._since = BURST, time.monotonic()

    def commits(self) -> OutcomeCommits | None:
        """What writes to the store; None where there is none."""
        store = self._store()
        if store is not None and self._commits is None:
            self._commits = OutcomeCommits(store)
        return self._commits

    def seconds_until(self, outcomes: int) -> float:
        """How long until so many may come; 0.0: now, and they are counted."""
        now = time.monotonic()
        self._left, self._since = min(BURST, self._left + RATE * (now - self._since)), now
        if outcomes <= self._left:
            self._left -= outcomes
            return 0.0
        return (outcomes - self._left) / RATE


class Recorded(BaseModel):
    """recorded: outcomes that are new. known: those that were there already, and stayed as they were."""

    object: Literal["merge.outcomes"] = "merge.outcomes"
    recorded: int
    known: int


@router.post(
    "/outcomes", summary="What became of answers", responses=errors(404, 413, 422, 429, 503), openapi_extra=_BODY
)
async def outcomes(request: Request) -> Recorded:
    """Write outcomes: an object, or {"outcomes": [objects]}. All of them or none.

    404: there are no experiments; 413: too many bytes; 422: row and field that are wrong; 429: too many a second; 503: the
    store did not take them.
    """
    desk: OutcomeDesk = request.app.state.vllm_merge_outcomes
    commits = desk.commits()
    if commits is None:
        raise RouteError(404, "the recipe file has no experiments, so there is nothing that outcomes could belong to")
    body = await _body(request)
    try:
        rows = await run_in_threadpool(read_outcomes, body, commits.store.definition, commits.store.experiments)
        if wait := desk.seconds_until(len(rows)):
            raise RouteError(429, f"more than {RATE:.0f} outcomes a second", retry_after=max(1, round(wait)))
        new = await commits.add(rows)
    except WrongOutcome as error:
        raise RouteError(422, str(error), param=error.place) from None
    except StoreError as error:
        raise RouteError(503, str(error), retry_after=1) from None
    return Recorded(recorded=sum(new), known=len(new) - sum(new))


async def _body(request: Request) -> object:
    """The JSON in the body. Raises RouteError."""
    held = bytearray()
    async for chunk in request.stream():
        held += chunk
        if len(held) > MOST_BYTES:
            raise RouteError(413, f"the body is larger than {MOST_BYTES} bytes; send outcomes in more requests")
    try:
        return json.loads(held)
    except (ValueError, RecursionError):
        raise RouteError(422, "the body is not JSON") from None
