# SPDX-License-Identifier: Apache-2.0
"""Routes that add a recipe to those that are served, and remove it again, at every API process alike."""

from __future__ import annotations

from fastapi import APIRouter, Depends, Request

from vllm_merge.recipe.adhoc import PREFIX, AdHocError, Written, parse_name
from vllm_merge.recipe.problems import suggested
from vllm_merge.serving.control.published import Published
from vllm_merge.serving.routes.admin import require_admin
from vllm_merge.serving.routes.json_route import JsonRoute
from vllm_merge.serving.routes.route_errors import RouteError, errors, told_of_changes
from vllm_merge.serving.routes.route_models import ChangedRecipe, RecipeName, ToAdd

admin_router = APIRouter(
    prefix="/v1/merge/recipes", tags=["merge"], dependencies=[Depends(require_admin)], route_class=JsonRoute
)

LASTS = "until the server ends; the recipe file must have it too to be served after that"


@admin_router.post("/{name}", summary="Serve another recipe", responses=errors(403, 409, 503))
async def add(name: RecipeName, wanted: ToAdd, request: Request) -> ChangedRecipe:
    """Serve a recipe over registered adapters and recipes under this name. It is made ready first; when this is answered, every
    API process serves it, and aliases can be moved to it. It stays when the recipe file is read again (there a recipe of the same
    name comes first), until it is removed or the server ends: put it into the recipe file as well to keep it.

    400: the recipe is wrong; 409: the name is taken, or it cannot be made; 503: not now. `plan` and `validate` are no names.
    """
    published: Published = request.app.state.vllm_merge_published
    with told_of_changes():
        try:
            if isinstance(wanted.merge, str) and not wanted.merge.startswith(PREFIX):
                raise AdHocError(
                    "merge", f"merge: expected a recipe, or one as a model name, which begins with {PREFIX!r}"
                )
            written = parse_name(wanted.merge) if isinstance(wanted.merge, str) else Written(wanted.merge)
            state = await published.add_recipe(name, written)
        except AdHocError as error:
            raise RouteError(400, str(error), param="merge" if error.param == "model" else error.param) from None
    known = state.names.names[name]
    return ChangedRecipe(
        recipe=name, artifact=known.label, digest=known.digest, generation=state.generation, lasts=LASTS
    )


@admin_router.delete("/{name}", summary="Forget a recipe that was added", responses=errors(403, 404, 409, 503))
async def remove(name: RecipeName, request: Request) -> ChangedRecipe:
    """Forget a recipe that a request added. Requests that run with it end as they began.

    404: no such recipe; 409: it is one of the recipe file, or an alias or another recipe needs it; 503: an API process does not
    answer.
    """
    published: Published = request.app.state.vllm_merge_published
    recipes = published.state.names.recipes.recipes
    if name not in recipes:
        hint = suggested(name, recipes, "recipes")
        raise RouteError(404, f"there is no recipe {name!r}{hint}", param="name")
    with told_of_changes():
        state = await published.remove_recipe(name)
    known = state.names.names.get(name)  # the recipe file's, where it has one of that name
    return ChangedRecipe(
        recipe=name,
        artifact=known.label if known is not None else None,
        digest=known.digest if known is not None else None,
        generation=state.generation,
        lasts="for good",
    )
