# SPDX-License-Identifier: Apache-2.0
"""Routes that only show, under /v1/merge/, where vLLM's own API-key check covers them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict

from fastapi import APIRouter, Request

from vllm_merge.serving.control.control import Message
from vllm_merge.serving.requests.adhoc import AdHocMerges
from vllm_merge.serving.requests.adhoc_table import Entry
from vllm_merge.serving.routes.overview import current, describe_names, in_memory
from vllm_merge.serving.routes.recipe_routes import router as recipe_router
from vllm_merge.serving.routes.route_errors import errors
from vllm_merge.serving.routes.route_models import (
    AdHocList,
    AdHocRow,
    FileRow,
    NameList,
    NameRow,
    WorkerList,
    WorkerRow,
)

router = APIRouter(prefix="/v1/merge", tags=["merge"])
router.include_router(recipe_router)


@router.get(
    "/recipes",
    summary="Every name of the recipe file, and its artifact",
    responses=errors(),
    response_model_exclude_unset=True,
)
async def recipes(request: Request) -> NameList:
    """Every name of the recipe file, the artifact it stands for, and that artifact's state (or why it has none).

    `file` says which generation is served, by every API process, and what is wrong with a newer file that is not.
    """
    now = await current(request.app.state)
    rows = [NameRow.model_validate(row) for row in describe_names(request.app.state.vllm_merge, now)]
    file = FileRow(generation=now.state.generation, error=now.state.error)
    return NameList(object="list", data=rows, file=file)


@router.get("/artifacts", summary="What every worker holds", responses=errors(), response_model_exclude_unset=True)
async def artifacts(request: Request) -> WorkerList:
    """What every worker holds in memory, with tier, bytes, leases and last use, and the merges that run."""
    workers = await request.app.state.vllm_merge.describe_workers()
    return WorkerList(object="list", data=[WorkerRow.model_validate(worker) for worker in workers])


@router.get("/adhoc", summary="Merges that requests brought", responses=errors())
async def adhoc(request: Request) -> AdHocList:
    """Merges that requests brought and that are kept, the least recently used first, and what they may cost."""
    merges: AdHocMerges | None = getattr(request.app.state, "vllm_merge_adhoc", None)
    if merges is None:
        return AdHocList(limits=None, data=[])
    workers = await request.app.state.vllm_merge.describe_workers()
    rows = [_adhoc_row(entry, workers) for entry in merges.table.entries()]
    return AdHocList(limits=asdict(merges.table.settings), data=rows)


def _adhoc_row(entry: Entry, workers: Sequence[Message]) -> AdHocRow:
    stage = entry.plan.stages[-1]
    max_rank = stage.rank if isinstance(stage.rank, int) else entry.plan.max_rank
    assert max_rank is not None, "plans of requests are made for a server"
    sources = [next(iter(item.source.model_dump().values())) for item in stage.inputs]
    return AdHocRow(
        artifact=entry.label,
        digest=entry.plan.digest,
        adapters=sources,
        merge_method=stage.merge_method,
        rank=(in_memory(workers, entry.plan.digest) or {}).get("rank"),
        max_rank=max_rank,
        bytes=entry.bytes,
        idle_seconds=round(time.monotonic() - entry.used, 1),
    )
