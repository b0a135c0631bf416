# SPDX-License-Identifier: Apache-2.0
"""Routes that show and move aliases. When a move is answered, no API process answers the alias as before."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, HTTPException, Request
from pydantic import BaseModel, ConfigDict, Field

from vllm_merge.errors import UserInputError
from vllm_merge.serving.admin import require_admin
from vllm_merge.serving.control import ControlError
from vllm_merge.serving.front import ArtifactUnavailable
from vllm_merge.serving.overview import current
from vllm_merge.serving.state import State

router = APIRouter(prefix="/v1/merge/aliases", tags=["merge"])


class Target(BaseModel):
    """Where an alias is to point."""

    model_config = ConfigDict(extra="forbid")

    target: Annotated[str, Field(min_length=1, description="A recipe or adapter of the recipe file.")]


@router.get("")
async def aliases(request: Request) -> dict[str, Any]:
    """Every alias, what it stands for now, and what the recipe file says where that is something else."""
    state = (await current(request.app.state)).state
    return {
        "object": "list",
        "generation": state.generation,
        "data": [_row(state, alias) for alias in state.names.recipes.aliases],
    }


@router.post("/{alias}", dependencies=[Depends(require_admin)])
async def move(alias: str, target: Target, request: Request) -> dict[str, Any]:
    """Point an alias at another recipe or adapter, which is made ready first. Requests that run keep their artifact.

    404: no such alias; 422: no such target; 409: the target cannot be made; 503: an API process does not answer.
    """
    published = request.app.state.vllm_merge_published
    if alias not in published.state.names.recipes.aliases:
        raise HTTPException(404, f"the recipe file has no alias {alias!r}")
    try:
        state = await published.move(alias, target.target)
    except UserInputError as error:
        raise HTTPException(422, str(error)) from None
    except ArtifactUnavailable as error:
        raise HTTPException(503 if error.retry else 409, f"{target.target} is not ready: {error}") from None
    except ControlError as error:
        raise HTTPException(503, str(error)) from None
    return {"generation": state.generation, **_row(state, alias)}


def _row(state: State, alias: str) -> dict[str, Any]:
    name, move = state.names.names[alias], state.moved.get(alias)
    return {
        "alias": alias,
        "target": state.target(alias),
        "artifact": name.label or None,
        "file_says": move.instead_of if move is not None else None,
    }
