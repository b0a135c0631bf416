# SPDX-License-Identifier: Apache-2.0
"""DELLA entry by entry: who is kept how often, and what the draws add up to. Merged statistics are in test_dare.py."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests import golden
from tests.adapters_in_memory import SHAPES, deltas, distance, random_adapter, three, weighted_sum
from vllm_merge import Adapter, LoraFactors, UserInputError, merge

STOCHASTIC = json.loads((golden.FOLDER / "stochastic.json").read_text(encoding="utf-8"))
ENTRYWISE = {case["id"]: case for case in STOCHASTIC["entrywise"]["statistics"]}
DRAWS = 500


def draws(adapter: Adapter, module: str, **parameters: Any) -> Tensor:
    """One adapter under many masks, (draws, rows, cols): merges of it alone, which leave what was kept."""
    alone = Adapter("alone", {module: adapter.factors[module]})
    arguments: dict[str, Any] = {"merge_method": "della_linear", "space": "delta", "rank": "lossless"}
    made = [merge([alone], parameters=parameters, seed=seed, report="brief", **arguments) for seed in range(DRAWS)]
    return torch.stack([merged.delta(module).double() for merged in made])


@pytest.mark.parametrize("name", ["della_mergekit_d0.5_e0.2_l1", "della_mergekit_d0.5_e0.2_none"])
def test_entries_have_the_statistics_of_the_official_code(name: str) -> None:
    case = ENTRYWISE[name]
    inputs = load_file(golden.FOLDER / STOCHASTIC["entrywise"]["inputs"])
    factors = LoraFactors(inputs["in.0.q_proj.lora_A"], inputs["in.0.q_proj.lora_B"], 2.0)
    matrix = factors.delta().double()
    rescale: Any = "l1" if case["params"]["rescale_norm"] else False
    params = {name: case["params"][name] for name in ("density", "epsilon")}
    values = draws(Adapter("a", {"q_proj": factors}), "q_proj", rescale=rescale, **params)
    kept = values.abs() > 1e-4 * matrix.abs()
    assert float(kept.double().mean()) == pytest.approx(case["keep_rate"]["theory"], abs=2e-3)
    assert float(kept.double().mean((1, 2)).std()) == pytest.approx(case["keep_rate"]["std_per_draw"], rel=0.15)
    order = matrix.abs().argsort(1)
    rate = kept.double().mean(0).gather(1, order).mean(0).view(8, -1).mean(1)
    assert rate.tolist() == pytest.approx(case["keep_rate_by_row_magnitude_rank_octile"], abs=0.01)
    largest = matrix.abs() > matrix.abs().mean()  # of the others, what truncation leaves is seen in the ratio
    ratio = (values / matrix)[kept & largest]
    assert float(ratio.mean()) == pytest.approx(case["rescale_factor_on_kept"]["mean"], rel=5e-3)
    for entry in case["entries"]:
        own = float(values[:, entry["row"], entry["col"]].mean())
        assert abs(own - entry["mean"]) <= 5 * entry["stderr"] * (1 + case["n_seeds"] / DRAWS) ** 0.5


def test_the_expectation_is_task_arithmetic() -> None:
    """Each entry is divided by its own probability, as in the paper; not so with mergekit's rescaling."""
    weights = [0.5, -0.3, 0.9]
    for rescale, low, high in ((True, 0.0, 0.1), ("l1", 0.12, 0.4)):
        mean = {m: torch.zeros(shape, dtype=torch.float64) for m, shape in SHAPES.items()}
        for seed in range(200):
            merged = merge(
                three(),
                merge_method="della_linear",
                space="delta",
                weights=weights,
                seed=seed,
                rank="lossless",
                report="brief",
                parameters={"rescale": rescale, "density": 0.5, "epsilon": 0.3},
            )
            mean = {m: value + deltas(merged)[m] / 200 for m, value in mean.items()}
        assert low <= distance(mean, weighted_sum(three(), weights)) < high


@pytest.mark.parametrize("space", ["delta", "knots"])
@pytest.mark.parametrize("method", ["della", "della_linear"])
def test_nothing_is_dropped_at_density_1(method: str, space: str) -> None:
    plain = {"della_linear": "task_arithmetic", "della": "breadcrumbs_ties"}[method]
    whole: dict[str, Any] = {} if method == "della_linear" else {"density": 1.0, "normalize": True}
    arguments: dict[str, Any] = {"space": space, "weights": [0.5, 2.0, -1.0], "rank": "lossless"}
    expected = merge(three(), merge_method=plain, parameters=whole, **arguments)
    assert distance(merge(three(), merge_method=method, parameters={"density": 1.0}, **arguments), expected) < 1e-6


def test_without_epsilon_it_is_dare() -> None:
    arguments: dict[str, Any] = {"space": "delta", "rank": "lossless", "seed": 3}
    della = merge(three(), merge_method="della_linear", parameters={"epsilon": 0.0}, **arguments)
    assert distance(della, merge(three(), merge_method="dare_linear", **arguments)) < 1e-6


@pytest.mark.parametrize(("density", "epsilon"), [(0.1, 0.2), (0.9, 0.2), (0.15, 0.15)])
def test_probabilities_that_are_none(density: float, epsilon: float) -> None:
    parameters = {"density": density, "epsilon": epsilon}
    with pytest.raises(UserInputError, match=r"adapter 'x': entries are kept with probabilities from .* Lower epsilon"):
        merge(three(), merge_method="della", parameters=parameters)


def test_ranks_of_rows_that_strips_cut() -> None:
    """A wide module in a small workspace: strips of columns, ranked as the whole rows are."""
    x = random_adapter("x", 4, 1)
    wide = Adapter("wide", {"layers.0.q_proj": x.factors["layers.0.q_proj"]})
    arguments: dict[str, Any] = {"merge_method": "della_linear", "space": "delta", "rank": "lossless"}
    arguments["parameters"] = {"density": 0.5, "epsilon": 0.49}
    whole, cut = (merge([wide], workspace_bytes=size, **arguments) for size in (1 << 30, 1 << 12))
    assert distance(cut, whole) < 3e-6
    assert cut.report.peak_workspace_bytes < whole.report.peak_workspace_bytes
