# SPDX-License-Identifier: Apache-2.0
"""What a plan would make and take on this server, from shapes and measured merges; no adapter's weights are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllm_merge.forecast.cautions import cautions_of_shapes
from vllm_merge.forecast.cost import DeviceCost, calibrations, cost_on
from vllm_merge.forecast.plan_cost import plan_cost
from vllm_merge.recipe.bounds import Shapes, stage_bounds
from vllm_merge.recipe.plan import EnergyRank, Plan, StageSource
from vllm_merge.serving.control.control import Message
from vllm_merge.serving.routes.overview import find
from vllm_merge.serving.routes.route_models import PlanAnswer, Prediction, StageRow
from vllm_merge.serving.worker.pace import kind_of


def foresee(
    plan: Plan, shapes: Mapping[str, Shapes], facts: Mapping[str, Any], workers: Sequence[Message], queue_seconds: int
) -> PlanAnswer:
    """facts: a worker's answer to `hello`; workers: what each says of itself. Blocks: the first look at a CPU measures it."""
    bounds = stage_bounds(plan, shapes)
    last = bounds[plan.stages[-1].name if plan.stages else plan.name]
    held = all(find(worker.get("artifacts", ()), plan.digest) for worker in workers)
    stages = [
        StageRow(
            name=stage.name,
            merge_method=stage.merge_method,
            space=stage.space,
            adapters=[i.source.stage if isinstance(i.source, StageSource) else i.source.adapter for i in stage.inputs],
            rank=bounds[stage.name].rank,
            bytes=bounds[stage.name].bytes,
        )
        for stage in plan.stages
    ]
    return PlanAnswer(
        artifact=plan.artifact_name,
        digest=plan.digest,
        state="ready" if held else "cold",
        rank=last.rank,
        bytes=last.bytes,
        modules=last.modules,
        parameters=last.parameters,
        stages=stages,
        predicted=_predicted(plan, shapes, facts, workers, queue_seconds),
        warnings=[*_rank_warnings(plan, shapes), *cautions_of_shapes(plan, shapes)],
        plan=plan.model_dump(mode="json", exclude={"adapters": {"__all__": {"path"}}}),
    )


def _predicted(
    plan: Plan, shapes: Mapping[str, Shapes], facts: Mapping[str, Any], workers: Sequence[Message], queue_seconds: int
) -> Prediction:
    """From merges that were measured on such a device; else from this server's own of the same kind; else unknown."""
    on = _device_cost(facts) if plan.stages else None
    cost = plan_cost(plan, shapes, on) if on is not None else None
    if cost is not None:
        return Prediction(
            seconds=round(cost.seconds, 6),
            measured_on=cost.device,
            workspace_bytes=cost.workspace,
            queue_seconds=queue_seconds,
        )
    paces = [pace for worker in workers if (pace := worker.get("pace", {}).get(kind_of(plan))) is not None]
    parameters = stage_bounds(plan, shapes)[plan.stages[-1].name].parameters if plan.stages else 0
    return Prediction(
        seconds=round(max(paces) * parameters, 6) if paces else None,
        measured_on="this server" if paces else None,
        workspace_bytes=None,
        queue_seconds=queue_seconds,
    )


def _device_cost(facts: Mapping[str, Any]) -> DeviceCost | None:
    """A GPU is the worker's, and is not measured from here: only one whose name was measured is known."""
    if facts["device"] == "cpu":
        return cost_on("cpu")
    known = (c for c in calibrations() if c.device == facts["device_name"])
    return next((DeviceCost(calibration, calibration.slower(None)) for calibration in known), None)


def _rank_warnings(plan: Plan, shapes: Mapping[str, Shapes]) -> list[str]:
    if not plan.stages or isinstance(plan.stages[-1].rank, EnergyRank):
        return []
    name = plan.stages[-1].name
    bound = stage_bounds(plan, shapes)[name].rank
    if plan.max_rank is not None and bound > plan.max_rank:
        return [f"the result may have rank {bound}, and this server takes {plan.max_rank} at most"]
    uncut = plan.model_copy(
        update={"stages": (*plan.stages[:-1], plan.stages[-1].model_copy(update={"rank": "lossless"}))}
    )
    most = stage_bounds(uncut, shapes)[name].rank
    return [f"the result may have rank up to {most} and is cut to {bound}"] if most > bound else []
