# SPDX-License-Identifier: Apache-2.0
"""Routes that show and move aliases. When a move is answered, no API process answers the alias as before."""

from __future__ import annotations

from collections.abc import Awaitable

from fastapi import APIRouter, Depends, Request

from vllm_merge.errors import UserInputError
from vllm_merge.serving.control.control import ControlError
from vllm_merge.serving.control.front import ArtifactUnavailable
from vllm_merge.serving.control.published import Published
from vllm_merge.serving.control.state import State
from vllm_merge.serving.routes.admin import require_admin
from vllm_merge.serving.routes.json_route import JsonRoute
from vllm_merge.serving.routes.overview import current
from vllm_merge.serving.routes.route_errors import RouteError, errors
from vllm_merge.serving.routes.route_models import AliasList, AliasName, AliasRow, MovedAlias, Target

router = APIRouter(prefix="/v1/merge/aliases", tags=["merge"])
admin_router = APIRouter(
    prefix="/v1/merge/aliases", tags=["merge"], dependencies=[Depends(require_admin)], route_class=JsonRoute
)


@router.get("", summary="Every alias", responses=errors())
async def aliases(request: Request) -> AliasList:
    """Every alias, what it stands for now, and what the recipe file says where that is something else."""
    state = (await current(request.app.state)).state
    rows = [AliasRow.model_validate(_row(state, alias)) for alias in state.names.recipes.aliases]
    return AliasList(generation=state.generation, data=rows)


@admin_router.post("/{alias}", summary="Point an alias elsewhere", responses=errors(403, 404, 409, 422, 503))
async def move(alias: AliasName, target: Target, request: Request) -> MovedAlias:
    """Point an alias at another recipe or adapter, which is made ready first. Requests that run keep their artifact.

    404: no such alias; 422: no such target; 409: the target cannot be made; 503: an API process does not answer.
    """
    published = _published(request, alias)
    return await _moved(alias, published.move(alias, target.target), 422)


@admin_router.post("/{alias}/back", summary="Undo the latest move of an alias", responses=errors(403, 404, 409, 503))
async def back(alias: AliasName, request: Request) -> MovedAlias:
    """Let an alias stand for what it stood for before its latest move; again, for what it stood for before that.

    The latest 16 moves are kept; where the file points the alias elsewhere, they are forgotten. 404: no such alias;
    409: it was not moved, or its target cannot be made any more; 503: an API process does not answer.
    """
    published = _published(request, alias)
    return await _moved(alias, published.move_back(alias), 409)


def _published(request: Request, alias: str) -> Published:
    published: Published = request.app.state.vllm_merge_published
    try:
        published.state.check_alias(alias)
    except UserInputError as error:
        raise RouteError(404, str(error), param="alias") from None
    return published


async def _moved(alias: str, moving: Awaitable[State], wrong: int) -> MovedAlias:
    try:
        state = await moving
    except UserInputError as error:
        raise RouteError(wrong, str(error), param="target" if wrong == 422 else "alias") from None
    except ArtifactUnavailable as error:
        status = 503 if error.retry else 409
        raise RouteError(
            status, f"the target of {alias} is not ready: {error}", retry_after=error.retry_after
        ) from None
    except ControlError as error:
        raise RouteError(503, str(error), retry_after=error.retry_after) from None
    return MovedAlias.model_validate({"generation": state.generation, **_row(state, alias)})


def _row(state: State, alias: str) -> dict[str, str | None]:
    target, says = state.target(alias), state.names.recipes.aliases[alias]
    return {
        "alias": alias,
        "target": target,
        "artifact": state.names.names[alias].label or None,
        "file_says": says if target != says else None,
        "before": state.before(alias),
    }
