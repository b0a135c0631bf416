# SPDX-License-Identifier: Apache-2.0
"""What a plan costs on a device, stage by stage, from the constants of merges that were measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vllm_merge.forecast.cost import DeviceCost
from vllm_merge.forecast.work import ModuleSize, case_key, works_in
from vllm_merge.methods.registry import default_registry
from vllm_merge.recipe.bounds import FULL_RANK_SPACES, Shapes, input_shapes
from vllm_merge.recipe.plan import EnergyRank, Plan, Stage


@dataclass(frozen=True, slots=True)
class PlanCost:
    """seconds: of all stages, tensors on the device to result on the device. workspace: most bytes held at once beside
    inputs and result. device: whose figures they come from.
    """

    seconds: float
    workspace: int
    device: str


def plan_cost(plan: Plan, adapters: Mapping[str, Shapes], on: DeviceCost) -> PlanCost | None:
    """The cost of `plan`; None where it has a stage of a kind that was not measured, or one with preconditions.

    adapters: {adapter: {module: (d_out, d_in, rank)}}.
    """
    seconds = workspace = 0.0
    for stage, inputs, result in input_shapes(plan, adapters):
        if stage.precondition:
            return None
        modules = [
            ModuleSize(d_out, d_in, tuple(shapes[name][2] if name in shapes else 0 for shapes in inputs), rank)
            for name, (d_out, d_in, rank) in result.items()
        ]
        found = on.predict(*_way(stage, modules), modules)
        if found is None:
            return None
        seconds += found[0]
        workspace = max(workspace, found[1])
    return PlanCost(seconds, round(workspace), on.calibration.device)


def _way(stage: Stage, modules: list[ModuleSize]) -> tuple[str, str]:
    """The name of the way to merge, and the space of its quantities."""
    spec, space = default_registry().get(stage.merge_method), stage.space
    bounded = stage.rank != "lossless" and not isinstance(stage.rank, EnergyRank)
    cut = any(module.rank < min(sum(module.ranks), module.d_out, module.d_in) for module in modules)
    if bounded:
        space = works_in(spec, space, stage.parameters, cut=cut)
    if space in FULL_RANK_SPACES:
        cut = bounded
    defaults = spec.defaults(per_adapter=False)
    return case_key(stage.merge_method, space, cut=cut, parameters=stage.parameters, defaults=defaults), space
