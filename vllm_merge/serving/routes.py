# SPDX-License-Identifier: Apache-2.0
"""Read-only routes under /v1/merge/, where vLLM's own API-key check covers them."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from vllm_merge.serving.overview import current, describe_names

router = APIRouter(prefix="/v1/merge", tags=["merge"])


@router.get("/recipes")
async def recipes(request: Request) -> dict[str, Any]:
    """Every name of the recipe file, the artifact it stands for, and that artifact's state (or why it has none).

    `file` says which generation is served, by every API process, and what is wrong with a newer file that is not.
    """
    now = await current(request.app.state)
    return {
        "object": "list",
        "data": describe_names(request.app.state.vllm_merge, now),
        "file": {"generation": now.state.generation, "error": now.state.error},
    }


@router.get("/artifacts")
async def artifacts(request: Request) -> dict[str, Any]:
    """What every worker holds in memory, with bytes, leases, and the merges that run."""
    return {"object": "list", "data": await request.app.state.vllm_merge.describe_workers()}
