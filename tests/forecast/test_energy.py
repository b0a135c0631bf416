# SPDX-License-Identifier: Apache-2.0
"""What is said of a result before the merge is what the merge then reports."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.adapters_in_memory import random_adapter, zero_adapter
from vllm_merge import Adapter, load_recipes
from vllm_merge.forecast.energy import Kept, kept_by_rank
from vllm_merge.forecast.overlap import Overlap
from vllm_merge.methods.registry import default_registry
from vllm_merge.plan_runner import run_plan
from vllm_merge.recipe.plan import Plan, make_plan

Forecast = Callable[..., tuple[Kept | None, Plan, dict[str, Adapter]]]

TWO = [
    {"adapter": "x", "parameters": {"weight": [{"filter": "up", "value": 0.3}, {"value": [1, -0.5]}]}},
    {"adapter": "y"},
]


@pytest.fixture
def forecast(tmp_path: Path) -> Forecast:
    """The forecast for a recipe `r`, its plan, and the adapters."""
    partial = random_adapter("z", 4, 3, size=2.0)
    adapters = {
        "x": random_adapter("x", 3, 1, scaling=2.0),
        "y": random_adapter("y", 5, 2),
        "z": Adapter("z", {module: factors for module, factors in partial.factors.items() if "q_proj" in module}),
        "zero": zero_adapter(),
    }

    def make(recipes: dict[str, Any], max_rank: int | None = None) -> tuple[Kept | None, Plan, dict[str, Adapter]]:
        file = tmp_path / "r.yaml"
        paths = {name: {"path": str(tmp_path / name)} for name in adapters}
        file.write_text(yaml.safe_dump({"version": 1, "adapters": paths, "recipes": recipes}))
        plan = make_plan(
            load_recipes(file),
            "r",
            registry=default_registry(),
            adapter_hashes={name: adapter.content_hash for name, adapter in adapters.items()},
            base_model_hash="",
            max_rank=max_rank,
            dtype="float32",
        )
        used = {name: adapters[name] for name in plan.adapters}
        ranks = {name: {m: f.rank for m, f in adapter.factors.items()} for name, adapter in used.items()}
        return kept_by_rank(plan, Overlap(list(used.values())), ranks), plan, used

    return make


LINEAR = {
    "mean": ({"r": {"merge_method": "linear", "adapters": TWO}}, 4),
    "sum": ({"r": {"merge_method": "task_arithmetic", "adapters": TWO, "parameters": {"lambda": [0.5, 2]}}}, 3),
    "sum in delta": ({"r": {"merge_method": "task_arithmetic", "space": "delta", "adapters": TWO}}, 4),
    "sum in knots": (
        {"r": {"merge_method": "linear", "space": "knots", "parameters": {"normalize": False}, "adapters": TWO}},
        4,
    ),
    "with an energy": ({"r": {"merge_method": "linear", "adapters": TWO, "rank": {"energy": 0.7}}}, None),
    "with an energy and a limit": ({"r": {"merge_method": "linear", "adapters": TWO, "rank": {"energy": 0.99}}}, 3),
    "nothing cut": ({"r": {"merge_method": "linear", "adapters": TWO}}, None),
    "missing modules and a zero adapter": (
        {"r": {"merge_method": "linear", "adapters": [*TWO, {"adapter": "z"}, {"adapter": "zero"}]}},
        5,
    ),
    "a recipe of a recipe": (
        {
            "in": {"merge_method": "linear", "adapters": TWO, "rank": "lossless"},
            "r": {"merge_method": "linear", "adapters": [{"adapter": "in"}, {"adapter": "z"}, {"adapter": "x"}]},
        },
        4,
    ),
}


@pytest.mark.parametrize("case", LINEAR)
def test_weighted_sums_are_known_exactly(case: str, forecast: Forecast) -> None:
    recipes, max_rank = LINEAR[case]
    kept, plan, adapters = forecast(recipes, max_rank)
    report = run_plan(plan, load_adapter=lambda planned: adapters[planned.name]).report
    assert kept is not None
    assert {module: rank for module, rank in kept.ranks.items() if rank} == report.ranks
    found = {module: 1.0 if share is None else share for module, share in report.energy_kept.items()}
    assert {module: kept.energy[module] for module in found} == pytest.approx(found, abs=1e-5)
    squares = {module: norm**2 for module, norm in report.norms.items()}
    whole = sum(square / found[module] for module, square in squares.items())
    assert kept.overall == pytest.approx(sum(squares.values()) / whole, abs=1e-5)


UNKNOWN = {
    "another rule": {"r": {"merge_method": "ties", "adapters": TWO}},
    "mean in knots": {"r": {"merge_method": "linear", "space": "knots", "adapters": TWO}},
    "precondition": {"r": {"merge_method": "linear", "adapters": TWO, "precondition": ["norm_cap"]}},
    "a sum of another rule": {
        "in": {"merge_method": "ties", "adapters": TWO},
        "r": {"merge_method": "linear", "adapters": [{"adapter": "in"}, {"adapter": "x"}]},
    },
    "a sum of what was cut": {
        "in": {"merge_method": "linear", "adapters": TWO, "rank": 2},
        "r": {"merge_method": "linear", "adapters": [{"adapter": "in"}, {"adapter": "x"}]},
    },
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_of_other_plans_nothing_is_claimed(case: str, forecast: Forecast) -> None:
    assert forecast(UNKNOWN[case], 4)[0] is None


def test_products_are_those_of_the_dense_changes() -> None:
    adapters = [random_adapter("x", 3, 1, scaling=2.0), random_adapter("y", 5, 2)]
    dense = [torch.cat([f.delta().double().flatten() for f in adapter.factors.values()]) for adapter in adapters]
    expected = torch.stack([torch.stack([one @ two for two in dense]) for one in dense])
    seen: list[tuple[int, int]] = []
    torch.testing.assert_close(
        Overlap(adapters, lambda *at: seen.append(at)).products(), expected, rtol=1e-5, atol=1e-6
    )
    assert seen[0] == (0, 4)
