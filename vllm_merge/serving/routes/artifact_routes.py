# SPDX-License-Identifier: Apache-2.0
"""Routes that show, warm, pin, evict and cancel artifacts. Every worker does it, or none where one refuses.

Those that change things are for whoever has the admin token, and so is the download.
"""

from __future__ import annotations

import re
from typing import Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import StreamingResponse

from vllm_merge.recipe.problems import suggested
from vllm_merge.serving.control.control import ControlError
from vllm_merge.serving.control.front import Artifact, ArtifactUnavailable, FrontDoor
from vllm_merge.serving.routes.admin import require_admin
from vllm_merge.serving.routes.download import MEDIA_TYPE, Download, LeasedResponse
from vllm_merge.serving.routes.route_errors import RouteError, errors
from vllm_merge.serving.routes.route_models import AnyName, Done, ReportAnswer

router = APIRouter(prefix="/v1/merge", tags=["merge"])
admin_router = APIRouter(prefix="/v1/merge", tags=["merge"], dependencies=[Depends(require_admin)])

_DIGEST = re.compile(r"[0-9a-f]{64}")


@router.get("/artifacts/{name}/report", summary="What a merge did", responses=errors(404, 409, 503))
async def report(name: AnyName, request: Request) -> ReportAnswer:
    """Ranks, norms, energy kept and conflicts of an artifact that is in a worker's cache; nothing is merged for it.

    404: no such artifact, or it is not in the cache (warm it first); 503: a worker does not answer.
    """
    front, digest = _find(request, name)
    reply = (await _ask(front, "report", digest))[0]
    if not reply["found"]:
        raise RouteError(404, f"{name} is not in the cache; warm it first, or ask it something", param="name")
    return ReportAnswer.model_validate(_finite(reply))


@admin_router.get(
    "/artifacts/{name}/download",
    summary="An artifact as a PEFT folder",
    response_class=StreamingResponse,
    responses={
        200: {
            "description": "A tar archive: adapter_config.json, merge_report.json (of a merge), adapter_model.safetensors.",
            "content": {MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}},
        },
        **errors(403, 404, 409, 503),
    },
)
async def download(name: AnyName, request: Request) -> LeasedResponse:
    """What a name stands for, as a tar archive of a PEFT folder, whole factors in the server's dtype with scaling 1.

    It comes from the nearest tier that has it, and is merged where none has. It is sent in pieces, and stays in the
    cache until it is sent. 409: it cannot be made; 503: not now.
    """
    front, digest = _find(request, name)
    artifact = _servable(front, name, digest)
    made = Download(front, artifact)
    try:
        await made.open()
    except ArtifactUnavailable as error:
        raise _refused(error) from None
    except ControlError as error:
        raise RouteError(503, str(error), retry_after=error.retry_after) from None
    return LeasedResponse(made)


@admin_router.post("/artifacts/{name}/warm", summary="Make an artifact ready", responses=errors(403, 404, 409, 503))
async def warm(name: AnyName, request: Request) -> Done:
    """Make what a name stands for ready, in the cache, but in no slot. 409: it cannot be made; 503: not now."""
    front, digest = _find(request, name)
    artifact = _servable(front, name, digest)
    try:
        await front.ready(artifact)
    except ArtifactUnavailable as error:
        raise _refused(error) from None
    return Done.model_validate({"name": name, "digest": digest, **artifact.facts})


@admin_router.post(
    "/artifacts/{name}/pin", summary="Keep an artifact in the cache", responses=errors(403, 404, 409, 503)
)
async def pin(name: AnyName, request: Request) -> Done:
    """Warm what a name stands for and keep it in the cache until it is unpinned, whatever the name stands for later.

    409: it cannot be made, or pins would leave no room for another artifact.
    """
    front, digest = _find(request, name)
    try:
        async with front.hold(_servable(front, name, digest), name):
            await front.links.ask("pin", digest=digest)
    except ArtifactUnavailable as error:
        raise _refused(error) from None
    except ControlError as error:
        await _ask(front, "unpin", digest)
        raise RouteError(409, str(error)) from None
    return Done.model_validate({"name": name, "digest": digest, "pinned": True})


@admin_router.post(
    "/artifacts/{name}/unpin", summary="Let go of a pinned artifact", responses=errors(403, 404, 409, 503)
)
async def unpin(name: AnyName, request: Request) -> Done:
    """`unpinned` is false where it was not pinned. `name` may be a digest."""
    return await _done(request, name, "unpin", "unpinned")


@admin_router.post(
    "/artifacts/{name}/evict", summary="Move an artifact to the tiers below", responses=errors(403, 404, 409, 503)
)
async def evict(name: AnyName, request: Request) -> Done:
    """Move an artifact from the cache to the tiers below; `evicted` is false where it is in use, pinned, or not there."""
    return await _done(request, name, "evict", "evicted")


@admin_router.delete("/merges/{name}", summary="Stop a merge", responses=errors(403, 404, 409, 503))
async def cancel(name: AnyName, request: Request) -> Done:
    """Stop the merge of what a name stands for; requests that wait for it get a 503. 404: it is not being merged."""
    front, digest = _find(request, name)
    if not any(reply["cancelled"] for reply in await _ask(front, "cancel", digest)):
        raise RouteError(404, f"{name} is not being merged", param="name")
    return Done.model_validate({"name": name, "digest": digest, "cancelled": True})


async def _done(request: Request, name: str, op: str, key: str) -> Done:
    front, digest = _find(request, name)
    done = any(reply[key] for reply in await _ask(front, op, digest))
    return Done.model_validate({"name": name, "digest": digest, key: done})


def _find(request: Request, name: str) -> tuple[FrontDoor, str]:
    """The digest of a recipe, alias, adapter or artifact, or a digest itself."""
    front: FrontDoor = request.app.state.vllm_merge
    known = front.known(name)
    if known is not None and known.digest is not None:
        return front, known.digest
    if known is not None:
        raise RouteError(409, f"{name} has no artifact: {known.reason}", param="name")
    if _DIGEST.fullmatch(name):
        return front, name
    hint = suggested(name, front.names)
    raise RouteError(404, f"no recipe, alias, adapter or artifact {name!r}{hint}", param="name")


def _servable(front: FrontDoor, name: str, digest: str) -> Artifact:
    artifact = front.artifacts.get(digest)
    if artifact is None:
        raise RouteError(404, f"{name} is no artifact that the recipe file knows; it cannot be made", param="name")
    return artifact


async def _ask(front: FrontDoor, op: str, digest: str) -> list[dict[str, Any]]:
    try:
        return await front.links.ask(op, digest=digest)
    except ControlError as error:
        raise RouteError(503, str(error), retry_after=error.retry_after) from None


def _refused(error: ArtifactUnavailable) -> RouteError:
    return RouteError(503 if error.retry else 409, str(error), retry_after=error.retry_after)


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for them."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value if not isinstance(value, float) or value - value == 0 else None
