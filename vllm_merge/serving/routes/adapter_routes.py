# SPDX-License-Identifier: Apache-2.0
"""Routes that show, add and remove registered adapters, at every API process alike."""

from __future__ import annotations

import asyncio
from collections.abc import Collection

from fastapi import APIRouter, Depends, Request

from vllm_merge.adapters.catalogue import Catalogue
from vllm_merge.errors import MergeError, UserInputError
from vllm_merge.recipe.problems import suggested
from vllm_merge.serving.control.published import Published
from vllm_merge.serving.control.state import State
from vllm_merge.serving.routes.adapter_root import folder_in
from vllm_merge.serving.routes.admin import require_admin
from vllm_merge.serving.routes.overview import current
from vllm_merge.serving.routes.route_errors import RouteError, errors, told_of_changes
from vllm_merge.serving.routes.route_models import AdapterList, AdapterRow, ChangedAdapter, FolderName
from vllm_merge.serving.settings import ADAPTER_ROOT_VARIABLE, adapter_root

router = APIRouter(prefix="/v1/merge/adapters", tags=["merge"])
admin_router = APIRouter(prefix="/v1/merge/adapters", tags=["merge"], dependencies=[Depends(require_admin)])


@router.get("", summary="Every registered adapter", responses=errors())
async def adapters(request: Request) -> AdapterList:
    """Every registered adapter: those of the recipe file, those that vLLM was given, and those that requests added."""
    state = (await current(request.app.state)).state
    given = request.app.state.vllm_merge_published.given
    rows = [_row(state, name, given) for name in state.names.recipes.adapters]
    return AdapterList(generation=state.generation, data=rows)


@admin_router.post(
    "/{name}", summary="Register an adapter from the allowed folder", responses=errors(403, 404, 409, 422, 503)
)
async def add(name: FolderName, request: Request) -> ChangedAdapter:
    """Register the PEFT folder of this name inside of VLLM_MERGE_ADAPTER_ROOT. When this is answered, every API process
    serves it under that name, and recipes of requests may use it; it stays until it is removed or the server ends.

    404: there is no such folder, or no root; 409: the name is taken, or the adapter does not fit the base model;
    422: the folder is no adapter that can be merged; 503: not now.
    """
    published: Published = request.app.state.vllm_merge_published
    root = adapter_root()
    if root is None:
        raise RouteError(
            404, f"no adapters can be added; start the server with {ADAPTER_ROOT_VARIABLE} set to a folder"
        )
    if (known := published.state.names.names.get(name)) is not None:
        raise RouteError(409, f"the name {name!r} is taken ({known.kind})", param="name")
    try:
        folder = await asyncio.to_thread(folder_in, root, name)
    except UserInputError as error:
        raise RouteError(404, str(error), param="name") from None
    try:
        await asyncio.to_thread(Catalogue().register, name, folder)
    except MergeError as error:
        raise RouteError(422, str(error).replace(f"{root}/", ""), param="name") from None
    with told_of_changes():
        state = await published.add_adapter(name, folder)
    return ChangedAdapter(adapter=name, artifact=state.names.names[name].label, generation=state.generation)


@admin_router.delete("/{name}", summary="Forget an adapter that was added", responses=errors(403, 404, 409, 503))
async def remove(name: FolderName, request: Request) -> ChangedAdapter:
    """Forget an adapter that a request added. Requests that run with it, or with merges of it, end as they began.

    404: no such adapter; 409: it is one of the recipe file or of vLLM, or recipes of the file need it; 503: an API process
    does not answer.
    """
    published: Published = request.app.state.vllm_merge_published
    adapters = published.state.names.recipes.adapters
    if name not in adapters:
        hint = suggested(name, adapters, "adapters")
        raise RouteError(404, f"there is no adapter {name!r}{hint}", param="name")
    with told_of_changes():
        state = await published.remove_adapter(name)
    return ChangedAdapter(adapter=name, artifact=None, generation=state.generation)


def _row(state: State, name: str, given: Collection[str]) -> AdapterRow:
    known = state.names.names.get(name)
    digest = known.digest if known is not None else None
    planned = state.names.plans[digest].adapters.values() if digest is not None else ()
    origin = "added" if name in state.added else "vllm" if name in given else "file"
    return AdapterRow(
        adapter=name,
        origin=origin,
        artifact=known.label or None if known is not None else None,
        digest=digest,
        content_hash=next((adapter.content_hash for adapter in planned), None),
        reason=(known.reason or None) if known is not None else "vLLM was given it, and it cannot be merged",
        warnings=list(state.names.warnings.get(name, ())),
    )
