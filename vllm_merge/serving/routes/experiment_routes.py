# SPDX-License-Identifier: Apache-2.0
"""Routes that show experiments and, for whoever has the admin token, promote an arm or stop. What is decided is in the store before it is answered, and obeyed by
every API process.
"""

from __future__ import annotations

import asyncio
import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, ConfigDict, Field

from vllm_merge.errors import MergeError, UserInputError
from vllm_merge.experiments.records import Decision
from vllm_merge.recipe.problems import listed, nearest, suggested
from vllm_merge.recipe.safety import refusal
from vllm_merge.serving.control.control import ControlError
from vllm_merge.serving.control.published import Published
from vllm_merge.serving.control.state import State
from vllm_merge.serving.folders import without_folders
from vllm_merge.serving.routes.admin import require_admin
from vllm_merge.serving.routes.json_route import JsonRoute
from vllm_merge.serving.routes.overview import current
from vllm_merge.serving.routes.route_errors import RouteError, errors

router = APIRouter(prefix="/v1/merge/experiments", tags=["merge"])
changes = APIRouter(
    prefix="/v1/merge/experiments", tags=["merge"], dependencies=[Depends(require_admin)], route_class=JsonRoute
)

Reason = Annotated[str, Field(max_length=500, description="Why, for whoever reads the report.")]


class Promotion(BaseModel):
    """Which arm is to get everybody."""

    model_config = ConfigDict(extra="forbid")

    arm: Annotated[str, Field(min_length=1, description="An arm of the experiment.")]
    reason: Reason = ""


class Stop(BaseModel):
    """Everybody is to get control."""

    model_config = ConfigDict(extra="forbid")

    reason: Reason = ""


@router.get("", summary="Every experiment", responses=errors())
async def experiments(request: Request) -> dict[str, Any]:
    """Every experiment of the recipe file: its arms and their artifacts, its status, and what was decided and why."""
    state = (await current(request.app.state)).state
    return {
        "object": "list",
        "generation": state.generation,
        "data": [_row(state, name) for name in state.trials.running],
        "exposures": _exposures(request),
    }


@router.get("/{name}", summary="One experiment", responses=errors(404))
async def experiment(name: str, request: Request) -> dict[str, Any]:
    """One experiment, with its whole definition."""
    state = (await current(request.app.state)).state
    _known(state, name)
    return {**_row(state, name), "definition": state.trials.running[name].to_document()}


@router.get("/{name}/report", summary="What an experiment has found", responses=errors(404, 503))
async def report(name: str, request: Request) -> dict[str, Any]:
    """What the store says of an experiment as it is defined now: arms, intervals, course over time, guardrails, verdict.

    404: no such experiment, or nothing of it is in the store yet.
    """
    published: Published = request.app.state.vllm_merge_published
    _known(published.state, name)
    try:
        facts = await asyncio.to_thread(_full_report, published, name)
    except UserInputError:
        raise RouteError(404, f"nothing of experiment {name} is in the store yet") from None
    except MergeError as error:
        raise RouteError(503, str(error), retry_after=5) from None
    return {key: value for key, value in facts.items() if key != "store"}  # where that is, is nobody's business


def _full_report(published: Published, name: str) -> dict[str, Any]:
    # Here, because scipy comes with it, which servers without experiments need not import.
    from vllm_merge.experiments.report import report

    return report(published.experiments.open_store(), name)


@changes.post("/{name}/promote", summary="Give everybody one arm", responses=errors(403, 404, 422, 503))
async def promote(name: str, promotion: Promotion, request: Request) -> dict[str, Any]:
    """Let everybody who asks for the experiment get one arm, and its alias stand for what the arm serves."""
    published: Published = request.app.state.vllm_merge_published
    arms = _known(published.state, name).experiment.arms
    if promotion.arm not in arms:
        hint = nearest(promotion.arm, arms)
        raise RouteError(422, f"{name} has no arm {promotion.arm!r}{hint} (arms: {listed(arms)})", param="arm")
    recipes, served = published.state.names.recipes, arms[promotion.arm].serve
    if unsafe := refusal(recipes.recipes, recipes.aliases.get(served, served)):
        raise RouteError(422, unsafe, param="arm")
    return _answer(await _decide(published, name, "promote", promotion.arm, promotion.reason), name)


@changes.post("/{name}/stop", summary="Give everybody control", responses=errors(403, 404, 503))
async def stop(name: str, request: Request, stop: Stop | None = None) -> dict[str, Any]:
    """Give everybody who asks for the experiment control, until its definition changes. An alias that a promotion moved stays
    where it is: `alias_left` says which, what it stands for, and what `POST /v1/merge/aliases/{alias}/back` returns it to.
    """
    published: Published = request.app.state.vllm_merge_published
    _known(published.state, name)
    state = await _decide(published, name, "stop", "", stop.reason if stop is not None else "")
    return {**_answer(state, name), "alias_left": _alias_left(state, name)}


async def _decide(published: Published, name: str, kind: Literal["promote", "stop"], arm: str, reason: str) -> State:
    version = published.state.trials.running[name].version
    decision = Decision(name, version, kind, time.time(), arm, reason=reason)
    try:
        await asyncio.to_thread(published.experiments.open_store().decide, decision)
        return await published.take_decisions()
    except (MergeError, ControlError) as error:
        raise RouteError(503, str(error), retry_after=5) from None


def _answer(state: State, name: str) -> dict[str, Any]:
    return {"generation": state.generation, **_row(state, name)}


def _alias_left(state: State, name: str) -> dict[str, str | None] | None:
    """The alias that still stands for what an experiment's promotion moved it to; None where none does."""
    experiment = state.trials.running[name].experiment
    alias, promoted = experiment.alias, [d.arm for d in state.trials.decided(name) if d.kind == "promote"]
    if alias is None or alias not in state.moved or not promoted:
        return None
    target = state.target(alias)
    if target != experiment.arms[promoted[-1]].serve:
        return None
    return {"alias": alias, "target": target, "before": state.before(alias)}


def _known(state: State, name: str) -> Any:
    if name not in state.trials.running:
        running = state.trials.running
        raise RouteError(404, f"the recipe file has no experiment {name!r}{suggested(name, running, 'experiments')}")
    return state.trials.running[name]


def _row(state: State, name: str) -> dict[str, Any]:
    trials, running = state.trials, state.trials.running[name]
    experiment, withdrawn, failed = running.experiment, trials.withdrawn(name), trials.failed.get(name, {})
    return {
        "experiment": name,
        "version": running.version,
        "status": _status(state, name),
        "alias": experiment.alias,
        "control": experiment.control_arm,
        "unit": experiment.unit,
        "coverage": experiment.coverage,
        "primary": experiment.primary.model_dump() if experiment.primary is not None else None,
        "arms": [
            {
                "arm": arm,
                "serves": entry.serve,
                "artifact": running.artifacts[arm],
                "weight": experiment.weights[arm],
                "withdrawn": withdrawn.breached.get(arm),
                "failed": without_folders(failed[arm]) if arm in failed else None,
            }
            for arm, entry in experiment.arms.items()
        ],
        "decisions": [
            {"kind": d.kind, "at": d.at, "arm": d.arm or None, "guardrail": d.guardrail or None, "reason": d.reason}
            for d in trials.decided(name)
        ],
    }


def _status(state: State, name: str) -> str:
    """running | promoted | stopped | not started | ended."""
    experiment, settled = state.trials.running[name].experiment, state.trials.settled(name)
    if settled is not None:
        return "promoted" if settled.kind == "promote" else "stopped"
    now = time.time()
    if experiment.start is not None and now < experiment.start.timestamp():
        return "not started"
    return "ended" if experiment.end is not None and now >= experiment.end.timestamp() else "running"


def _exposures(request: Request) -> dict[str, int] | None:
    """What this API process has written, what waits, and what did not fit; None where it has no store."""
    writer = request.app.state.vllm_merge_experiments.writer
    if writer is None:
        return None
    return {"written": writer.written, "waiting": writer.waiting, "dropped": writer.dropped}
