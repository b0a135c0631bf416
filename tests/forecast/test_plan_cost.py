# SPDX-License-Identifier: Apache-2.0
"""The cost of a plan is that of its stages."""

from collections.abc import Mapping
from typing import Any

import pytest

from vllm_merge.forecast.cost import Calibration, Cost, DeviceCost
from vllm_merge.forecast.plan_cost import plan_cost
from vllm_merge.forecast.probe import Speed
from vllm_merge.methods.registry import default_registry
from vllm_merge.recipe.plan import AdapterSource, Plan, PlannedAdapter, PlannedInput, Stage, StageSource

SHAPES = {name: {"layers.0.q_proj": (64, 32, 4), "layers.1.q_proj": (64, 32, 4)} for name in "abc"}


def a_stage(name: str, sources: list[Any], method: str = "ties", space: str = "knots", **more: Any) -> Stage:
    return Stage(
        name=name,
        merge_method=method,
        method_version=1,
        space=space,
        inputs=tuple(PlannedInput(source=source, parameters={}) for source in sources),
        parameters={**default_registry().get(method).defaults(per_adapter=False), **more.pop("parameters", {})},
        precondition=more.pop("precondition", ()),
        rank=more.pop("rank", "auto"),
        seed=0,
    )


def a_plan(*stages: Stage, max_rank: int | None = None) -> Plan:
    return Plan(
        kind="recipe",
        name=stages[-1].name,
        digest="",
        adapters={name: PlannedAdapter(name=name, path="/", content_hash="") for name in SHAPES},
        stages=stages,
        dtype="bfloat16",
        base_model_hash="",
        max_rank=max_rank,
    )


def on(costs: Mapping[str, float]) -> DeviceCost:
    """A device on which each way to merge has these seconds a module, and a tenth of them as bytes of workspace."""
    made = {key: Cost({"modules": value}, {"modules": value / 20}, 1e12) for key, value in costs.items()}
    calibration = Calibration("Some GPU", "cuda", Speed(1, 1, 1), made)
    return DeviceCost(calibration, calibration.slower(None))


ADAPTERS = [AdapterSource(adapter=name) for name in "ab"]


def test_stages_add_up_and_the_largest_workspace_counts() -> None:
    first = a_stage("first", ADAPTERS)
    last = a_stage("last", [StageSource(stage="first"), AdapterSource(adapter="c")], "tsv_m", "core")
    found = plan_cost(a_plan(first, last), SHAPES, on({"ties/knots/whole": 100, "tsv_m/core/whole": 1000}))
    assert found is not None
    assert (found.seconds, found.workspace, found.device) == (2 * 1100, 100, "Some GPU")


@pytest.mark.parametrize(
    ("stage", "max_rank", "key"),
    [
        (a_stage("s", ADAPTERS), None, "ties/knots/whole"),
        (a_stage("s", ADAPTERS, rank=8), None, "ties/knots/whole"),
        (a_stage("s", ADAPTERS, rank=7), None, "ties/knots/cut"),
        (a_stage("s", ADAPTERS, space="delta", rank=8), None, "ties/delta/cut"),
        (a_stage("s", ADAPTERS, space="delta", rank="lossless"), None, "ties/delta/whole"),
        (a_stage("s", ADAPTERS, parameters={"trim": "module"}), None, "ties/knots/whole/trim=module"),
    ],
)
def test_each_way_to_merge_has_constants_of_its_own(stage: Stage, max_rank: int | None, key: str) -> None:
    plan = a_plan(stage, max_rank=max_rank)
    assert plan_cost(plan, SHAPES, on({key: 1.0})) is not None
    assert plan_cost(plan, SHAPES, on({"another": 1.0})) is None


@pytest.mark.parametrize("space", ["knots", "delta"])
@pytest.mark.parametrize(
    ("parameters", "rank", "max_rank", "key"),
    [
        ({}, "auto", None, "do_merging/core/whole"),
        ({}, 8, None, "do_merging/core/whole"),
        ({"orthogonalize": "none"}, "auto", 8, "do_merging/core/whole/orthogonalize=none"),
        ({}, 7, None, "do_merging/{space}/cut"),
        ({}, "lossless", None, "do_merging/{space}/whole"),
        ({"direction_rule": "ties"}, 8, None, "do_merging/{space}/{full}/direction_rule=ties"),
    ],
)
def test_columns_that_are_scaled_and_not_cut_have_no_entries(
    space: str, parameters: dict[str, Any], rank: int | str, max_rank: int | None, key: str
) -> None:
    key = key.format(space=space, full="cut" if space == "delta" else "whole")
    plan = a_plan(a_stage("s", ADAPTERS, "do_merging", space, parameters=parameters, rank=rank), max_rank=max_rank)
    entries = Cost({"entries": 1.0}, {}, 1e12)
    calibration = Calibration("Some GPU", "cuda", Speed(1, 1, 1), {key: entries})
    found = plan_cost(plan, SHAPES, DeviceCost(calibration, calibration.slower(None)))
    assert found is not None
    assert (found.seconds > 0) == ("/delta/" in key)


def test_preconditions_are_not_forecast() -> None:
    plan = a_plan(a_stage("s", ADAPTERS, precondition=({"norm_cap": {}},)))
    assert plan_cost(plan, SHAPES, on({"ties/knots/whole": 1.0})) is None
