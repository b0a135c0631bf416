# SPDX-License-Identifier: Apache-2.0
"""How long a plan takes, from a few modules."""

import time
from typing import Any

import pytest

from tests.adapters_in_memory import SHAPES, random_adapter
from vllm_merge import Adapter
from vllm_merge.forecast import sample as module
from vllm_merge.forecast.sample import measure
from vllm_merge.recipe.plan import AdapterSource, Plan, PlannedAdapter, PlannedInput, Stage


def a_plan(rank: Any = 2) -> tuple[Plan, dict[str, Adapter]]:
    adapters = {name: random_adapter(name, 3, seed) for seed, name in enumerate("ab")}
    parameters = {"weight": 1.0, "density": 0.5}
    stage = Stage(
        name="r",
        merge_method="ties",
        method_version=1,
        space="delta",
        inputs=tuple(PlannedInput(source=AdapterSource(adapter=name), parameters=parameters) for name in adapters),
        parameters={"normalize": True, "trim": "global", "lambda": 1.0},
        precondition=(),
        rank=rank,
        seed=0,
    )
    planned = {name: PlannedAdapter(name=name, path="/", content_hash="") for name in adapters}
    plan = Plan(
        kind="recipe",
        name="r",
        digest="",
        adapters=planned,
        stages=(stage,),
        dtype="float32",
        base_model_hash="",
        max_rank=None,
    )
    return plan, adapters


def test_all_shapes_are_measured() -> None:
    found = measure(*a_plan(), "cpu", energy=True)
    assert found.complete
    assert found.modules == 4
    assert found.energy.keys() == SHAPES.keys()
    assert all(share is not None and 0 < share < 1 for share in found.energy.values())
    assert 0 < found.seconds < 5


def test_energy_is_measured_only_where_it_is_wanted() -> None:
    assert measure(*a_plan(), "cpu", energy=False).energy == {}


def test_seconds_are_scaled_by_the_number_of_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten layers of two shapes: two modules of each are merged, at 10 ms, and stand for ten."""
    calls = []

    def slow(plan: Plan, adapters: Any, chosen: set[str], device: str, deadline: float) -> Any:
        calls.append(chosen)
        time.sleep(0.01)
        return object()

    monkeypatch.setattr(module, "_run", slow)
    plan, adapters = a_plan()
    layers = {
        name: Adapter(
            name,
            {f"layers.{i}.{m.split('.')[-1]}": f for i in range(10) for m, f in adapter.factors.items()},
        )
        for name, adapter in adapters.items()
    }
    found = measure(plan, layers, "cpu", energy=False)
    assert calls[1:] == [
        {"layers.0.q_proj", "layers.9.q_proj"},
        {"layers.0.up_proj", "layers.9.up_proj"},
    ]
    assert found.seconds == pytest.approx(0.1, rel=0.5)


def test_a_merge_that_is_too_long_is_a_lower_bound() -> None:
    found = measure(*a_plan(), "cpu", energy=True, budget=0.0)
    assert not found.complete
    assert found.energy == {}
