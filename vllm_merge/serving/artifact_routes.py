# SPDX-License-Identifier: Apache-2.0
"""Routes that warm, pin, evict and cancel, for whoever has the admin token. Every worker does it, or none where one refuses."""

from __future__ import annotations

import re
from typing import Any

from fastapi import APIRouter, Depends, HTTPException, Request

from vllm_merge.serving.admin import require_admin
from vllm_merge.serving.control import ControlError
from vllm_merge.serving.front import ArtifactUnavailable, FrontDoor

router = APIRouter(prefix="/v1/merge", tags=["merge"], dependencies=[Depends(require_admin)])

_DIGEST = re.compile(r"[0-9a-f]{64}")


@router.post("/artifacts/{name}/warm")
async def warm(name: str, request: Request) -> dict[str, Any]:
    """Make what a name stands for ready, in the cache, but in no slot. 409: it cannot be made; 503: not now."""
    front, digest = _find(request, name)
    artifact = _servable(front, name, digest)
    try:
        await front.ready(artifact)
    except ArtifactUnavailable as error:
        raise _refused(error) from None
    return {"name": name, "digest": digest, **artifact.facts}


@router.post("/artifacts/{name}/pin")
async def pin(name: str, request: Request) -> dict[str, Any]:
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
        await front.links.ask("unpin", digest=digest)
        raise HTTPException(409, str(error)) from None
    return {"name": name, "digest": digest, "pinned": True}


@router.post("/artifacts/{name}/unpin")
async def unpin(name: str, request: Request) -> dict[str, Any]:
    """`unpinned` is false where it was not pinned. `name` may be a digest."""
    front, digest = _find(request, name)
    return {"name": name, "digest": digest, "unpinned": any(r["unpinned"] for r in await _ask(front, "unpin", digest))}


@router.post("/artifacts/{name}/evict")
async def evict(name: str, request: Request) -> dict[str, Any]:
    """Move an artifact from the cache to the tiers below; `evicted` is false where it is in use, pinned, or not there."""
    front, digest = _find(request, name)
    return {"name": name, "digest": digest, "evicted": any(r["evicted"] for r in await _ask(front, "evict", digest))}


@router.delete("/merges/{name}")
async def cancel(name: str, request: Request) -> dict[str, Any]:
    """Stop the merge of what a name stands for; requests that wait for it get a 503. 404: it is not being merged."""
    front, digest = _find(request, name)
    if not any(reply["cancelled"] for reply in await _ask(front, "cancel", digest)):
        raise HTTPException(404, f"{name} is not being merged")
    return {"name": name, "digest": digest, "cancelled": True}


def _find(request: Request, name: str) -> tuple[FrontDoor, str]:
    """The digest of a recipe, alias, adapter or artifact, or a digest itself."""
    front: FrontDoor = request.app.state.vllm_merge
    known = front.known(name)
    if known is not None and known.digest is not None:
        return front, known.digest
    if known is not None:
        raise HTTPException(409, f"{name} has no artifact: {known.reason}")
    if _DIGEST.fullmatch(name):
        return front, name
    raise HTTPException(404, f"no recipe, alias, adapter or artifact {name!r} is served")


def _servable(front: FrontDoor, name: str, digest: str) -> Any:
    artifact = front.artifacts.get(digest)
    if artifact is None:
        raise HTTPException(404, f"{name} is no artifact that the recipe file knows; it cannot be made")
    return artifact


async def _ask(front: FrontDoor, op: str, digest: str) -> list[dict[str, Any]]:
    try:
        return await front.links.ask(op, digest=digest)
    except ControlError as error:
        raise HTTPException(503, str(error)) from None


def _refused(error: ArtifactUnavailable) -> HTTPException:
    headers = {"retry-after": str(error.retry_after)} if error.retry_after else None
    return HTTPException(503 if error.retry else 409, str(error), headers)
