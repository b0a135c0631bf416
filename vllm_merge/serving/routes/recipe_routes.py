# SPDX-License-Identifier: Apache-2.0
"""Routes that say of a recipe what it would make, and of a recipe file whether it is right. Nothing is merged or changed."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from fastapi import APIRouter, Request

from vllm_merge.errors import MergeError
from vllm_merge.recipe.adhoc import PREFIX, AdHocError, Limits, Written, parse_name
from vllm_merge.recipe.plan import Plan
from vllm_merge.recipe.problems import MAX_KEY, MAX_MESSAGE, cut, dotted, suggested
from vllm_merge.recipe.yaml_tree import MAX_BYTES
from vllm_merge.recipe_files import problems_of
from vllm_merge.serving.control.control import ControlError
from vllm_merge.serving.control.front import FrontDoor
from vllm_merge.serving.control.names import MAX_ADAPTERS
from vllm_merge.serving.control.published import Published
from vllm_merge.serving.requests.adhoc import plan_written, shapes_of
from vllm_merge.serving.routes.foresight import foresee
from vllm_merge.serving.routes.json_route import JsonRoute
from vllm_merge.serving.routes.route_errors import RouteError, errors
from vllm_merge.serving.routes.route_models import PlanAnswer, ProblemRow, ToPlan, Validation

logger = logging.getLogger("vllm_merge")

router = APIRouter(route_class=JsonRoute)

MAX_PROBLEMS = 50  # that are told
FILE = Path("recipes.yaml")  # what a text is called in messages

_one_at_a_time = asyncio.Semaphore(1)  # texts that are read: it takes a processor
_TEXT = {"schema": {"type": "string", "maxLength": MAX_BYTES}, "example": "version: 1\nrecipes: {}\n"}


@router.post("/recipes/plan", summary="What a recipe would make", responses=errors(404, 409, 503))
async def plan(wanted: ToPlan, request: Request) -> PlanAnswer:
    """Ranks, bytes, predicted cost and warnings of a recipe, without merging it. The recipe may use registered adapters and
    recipes of the file, and says what an ad-hoc merge may say; whether those are allowed here does not matter.

    400: the recipe is wrong; 404: no such name; 409: the name has no artifact; 503: a worker does not answer.
    """
    front: FrontDoor = request.app.state.vllm_merge
    published: Published = request.app.state.vllm_merge_published
    facts = front.links.all[0].facts
    try:
        planned = _planned(front, published, wanted)
        near = await front.links.ask("near", digest=planned.digest)
        workers = await front.describe_workers()
        shapes = await asyncio.to_thread(shapes_of, planned, {})
        queue = max(reply["retry_after"] for reply in near)
        return await asyncio.to_thread(foresee, planned, shapes, facts, workers, queue)
    except AdHocError as error:
        raise RouteError(400, str(error), param=error.param) from None
    except ControlError as error:
        raise RouteError(503, str(error), retry_after=error.retry_after) from None
    except MergeError as error:
        logger.error("a recipe cannot be planned: %s", error)
        raise RouteError(409, str(error), param="merge") from None


def _planned(front: FrontDoor, published: Published, wanted: ToPlan) -> Plan:
    if isinstance(wanted.merge, str) and not wanted.merge.startswith(PREFIX):
        known = front.known(wanted.merge)
        if known is None:
            hint = suggested(wanted.merge, front.names)
            raise RouteError(404, f"no recipe, alias or adapter {cut(wanted.merge, 100)!r}{hint}", param="merge")
        if known.digest is None:
            raise RouteError(409, f"{known.name} has no artifact: {known.reason}", param="merge")
        return front.artifacts[known.digest].plan
    facts = front.links.all[0].facts
    written = parse_name(wanted.merge) if isinstance(wanted.merge, str) else Written(wanted.merge)
    return plan_written(written, published.state.names, facts, Limits(facts["max_lora_rank"], MAX_ADAPTERS))[1]


@router.post(
    "/recipes/validate",
    summary="Whether a recipe file is right",
    responses=errors(413),
    openapi_extra={
        "requestBody": {
            "required": True,
            "description": "The recipe file as it is, YAML or JSON.",
            "content": {"application/yaml": _TEXT, "text/plain": _TEXT},
        }
    },
)
async def validate(request: Request) -> Validation:
    """Every mistake in a recipe file with its line, as the server would find them. Nothing that it names is looked for.

    413: the text has more than 256 KiB.
    """
    raw = bytearray()
    async for chunk in request.stream():
        raw += chunk
        if len(raw) > MAX_BYTES:
            raise RouteError(413, f"the text has more than {MAX_BYTES:,} bytes, and so no server takes it; split it")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        return Validation(valid=False, problems=[ProblemRow(line=line, key="", message="is not UTF-8 text")])
    published: Published = request.app.state.vllm_merge_published
    registered = {*published.given, *published.state.added}
    async with _one_at_a_time:
        found = await asyncio.to_thread(problems_of, text, FILE, registered=registered)
    rows = [
        ProblemRow(line=p.line, key=cut(dotted(p.path), MAX_KEY), message=cut(p.message, MAX_MESSAGE))
        for p in found[:MAX_PROBLEMS]
    ]
    return Validation(valid=not found, problems=rows)
