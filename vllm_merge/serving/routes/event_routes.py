# SPDX-License-Identifier: Apache-2.0
"""Server-sent events of what happens on a server."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator

from fastapi import APIRouter, Request
from starlette.responses import StreamingResponse

from vllm_merge.serving.routes.events import KINDS, Event, EventHub
from vllm_merge.serving.routes.route_errors import RouteError, errors

router = APIRouter(prefix="/v1/merge", tags=["merge"])

HEARTBEAT_SECONDS = 15.0
LOOK_SECONDS = 1.0  # between two looks whether the client, the worker and the server are still there

_EXAMPLE = 'id: 7\nevent: merge\ndata: {"state": "ready", "artifact": "support@3f9c0d21ab45", "seconds": 0.41}\n\n'
_STREAM = {
    "description": f"Events of the kinds {', '.join(KINDS)}; their data is JSON. Lines that begin with a colon are heartbeats.",
    "content": {"text/event-stream": {"schema": {"type": "string"}, "example": _EXAMPLE}},
}


@router.get(
    "/events",
    summary="Follow merges, evictions, and changes of what is served",
    response_class=StreamingResponse,
    responses={200: _STREAM, **errors(503)},
)
async def events(request: Request) -> StreamingResponse:
    """Server-sent events, from now on, until the client leaves or the server stops. Any API process tells of everything.

    503: too many clients listen already.
    """
    hub: EventHub = request.app.state.vllm_merge_events
    if hub.full:
        raise RouteError(503, "too many clients listen to this process already", retry_after=int(HEARTBEAT_SECONDS))
    headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
    return StreamingResponse(stream(request, hub), media_type="text/event-stream", headers=headers)


async def stream(request: Request, hub: EventHub) -> AsyncIterator[str]:
    """The events as text. Ends when nobody is there to read, or to tell."""
    front = request.app.state.vllm_merge
    if hub.full:  # many came at once, each before the others listened
        yield f"retry: {int(HEARTBEAT_SECONDS * 1000)}\n\n"
        return
    with hub.listen() as listener:
        spoke = time.monotonic()
        while front.connected and not await request.is_disconnected():  # when vLLM stops, its workers end first
            event = await listener.next(LOOK_SECONDS)
            if event is not None:
                yield text(event)
            elif time.monotonic() - spoke >= HEARTBEAT_SECONDS:
                yield ":\n\n"
            else:
                continue
            spoke = time.monotonic()


def text(event: Event) -> str:
    """One event in the format of https://html.spec.whatwg.org/multipage/server-sent-events.html."""
    return f"id: {event.number}\nevent: {event.kind}\ndata: {json.dumps(event.data, separators=(',', ':'))}\n\n"
