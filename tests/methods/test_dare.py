# SPDX-License-Identifier: Apache-2.0
"""DARE: statistics against the official code (of DELLA as well), and what holds for every draw."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests import golden, golden_do, golden_mergekit
from tests.adapters_in_memory import (
    SHAPES,
    deltas,
    distance,
    map_factors,
    random_adapter,
    three,
    weighted_sum,
    zero_adapter,
)
from tests.methods.cases import HARD, regauged
from vllm_merge import Adapter, LoraFactors, MergedAdapter, merge
from vllm_merge.algebra.masks import keep_mask, mask_keys

STOCHASTIC = json.loads((golden.FOLDER / "stochastic.json").read_text(encoding="utf-8"))
ENTRYWISE = {case["id"]: case for case in STOCHASTIC["entrywise"]["statistics"]}
RECIPES = {
    case["id"]: golden_do.recipe_for(case) or golden_mergekit.recipe_for(case) or {} for case in STOCHASTIC["merged"]
}
MERGED = [case for case in STOCHASTIC["merged"] if RECIPES[case["id"]]]
CELLS = [(method, space) for method in ("dare_linear", "dare_ties") for space in ("delta", "knots", "core")]
each_cell = pytest.mark.parametrize(("method", "space"), CELLS)


def run(adapters: list[Adapter], method: str, space: str, *, rank: Any = "lossless", **more: Any) -> MergedAdapter:
    return merge(adapters, merge_method=method, space=space, rank=rank, **more)


@pytest.mark.parametrize("case", MERGED, ids=lambda case: case["id"])
def test_merges_have_the_statistics_of_the_official_code(case: golden.Entry) -> None:
    recipe = RECIPES[case["id"]]
    tensors = load_file(golden.FOLDER / case["file"])
    inputs = load_file(golden.FOLDER / STOCHASTIC["entrywise"]["inputs"])
    scalings = [alpha / rank for alpha, rank in zip(case["alphas"], case["ranks"], strict=True)]
    adapters = [
        Adapter(
            f"a{i}",
            {m: LoraFactors(*(inputs[f"in.{i}.{m}.lora_{side}"] for side in "AB"), scaling) for m in case["modules"]},
        )
        for i, scaling in enumerate(scalings)
    ]
    draws, official = 200, case["n_seeds"]
    mean = {m: torch.zeros(*shape, dtype=torch.float64) for m, shape in case["modules"].items()}
    square = {m: torch.zeros_like(value) for m, value in mean.items()}
    for seed in range(draws):
        merged = merge(adapters, rank="lossless", seed=seed, **recipe)
        for module in mean:
            dense = merged.delta(module).double()
            mean[module] += dense / draws
            square[module] += dense.square() / draws
    own = torch.cat([mean[m].flatten() for m in mean])
    expected = torch.cat([tensors[f"out_mean.{m}"].double().flatten() for m in mean])
    spread = torch.cat([tensors[f"out_std.{m}"].double().flatten() for m in mean])
    bound = 5 * spread * (1 / draws + 1 / official) ** 0.5
    assert ((own - expected).abs() <= bound)[spread > 0].double().mean() >= 0.999
    relative = float((own - expected).norm() / expected.norm())
    assert relative < 1.5 * case["rel_stderr_of_mean"] * (1 + official / draws) ** 0.5
    own_spread = (torch.cat([square[m].flatten() for m in mean]) - own.square()).clamp_min(0).sqrt()
    assert float(own_spread.norm() / spread.norm()) == pytest.approx(1, abs=0.02)


def draws_of_one_matrix(density: float, rescale: bool, draws: int) -> tuple[Tensor, Tensor]:
    """The golden matrix, and it under `draws` masks: merges of one adapter in space delta, without the merge around."""
    inputs = load_file(golden.FOLDER / STOCHASTIC["entrywise"]["inputs"])
    matrix = 2.0 * inputs["in.0.q_proj.lora_B"] @ inputs["in.0.q_proj.lora_A"]
    keys = torch.cat([mask_keys(seed, ["adapter"], ["q_proj"]) for seed in range(draws)])
    share = torch.full((1, 1, 1, 1), density)
    mask = keep_mask(keys, share, slice(0, matrix.shape[0]), slice(0, matrix.shape[1]))[:, 0]
    return matrix, mask * matrix / (density if rescale else 1)


@pytest.mark.parametrize(
    ("name", "density", "rescale"),
    [
        ("dare_paper_p0.3", 0.7, True),
        ("dare_paper_p0.9", 0.1, True),
        ("dare_paper_p0.3_norescale", 0.7, False),
        ("dare_knots_p0.4", 0.6, True),
        ("dare_peft_d0.3", 0.3, True),
    ],
)
def test_entries_have_the_statistics_of_the_official_code(name: str, density: float, rescale: bool) -> None:
    case, draws = ENTRYWISE[name], 2000
    matrix, values = draws_of_one_matrix(density, rescale, draws)
    kept = (values != 0).double().mean((1, 2))
    assert float(kept.mean()) == pytest.approx(case["keep_rate"]["theory"], abs=1e-3)
    assert float(kept.std()) == pytest.approx(case["keep_rate"]["std_per_draw"], rel=0.1)
    factors = (values / matrix)[values != 0]
    assert factors.min() == pytest.approx(case["rescale_factor_on_kept"]["min"], rel=1e-6)
    assert factors.max() == pytest.approx(case["rescale_factor_on_kept"]["max"], rel=1e-6)
    for entry in case["entries"]:
        own = float(values[:, entry["row"], entry["col"]].double().mean())
        bound = 5 * entry["stderr"] * (1 + case["n_seeds"] / draws) ** 0.5
        assert abs(own - entry["mean"]) <= bound


@pytest.mark.parametrize("space", ["delta", "knots", "core"])
def test_the_expectation_of_dare_linear_is_task_arithmetic(space: str) -> None:
    weights, draws = [0.5, -0.3, 0.9], 100
    mean = {m: torch.zeros(shape, dtype=torch.float64) for m, shape in SHAPES.items()}
    for seed in range(draws):
        merged = deltas(run(three(), "dare_linear", space, weights=weights, seed=seed, parameters={"density": 0.7}))
        mean = {m: value + merged[m] / draws for m, value in mean.items()}
    # Every entry has the variance (1 − p) / p · x², here a relative √(3/7) per draw.
    assert distance(mean, weighted_sum(three(), weights)) < 1.5 * (3 / 7 / draws) ** 0.5
    one = run(three(), "dare_linear", space, weights=weights, parameters={"density": 0.7})
    assert distance(one, weighted_sum(three(), weights)) > 0.4


@each_cell
def test_nothing_is_dropped_at_density_1(method: str, space: str) -> None:
    plain = {"dare_linear": "task_arithmetic", "dare_ties": "ties"}[method]
    density = {} if method == "dare_linear" else {"density": 1.0}
    expected = run(three(), plain, space, weights=[0.5, 2.0, -1.0], parameters=density)
    assert distance(run(three(), method, space, weights=[0.5, 2.0, -1.0], parameters={"density": 1.0}), expected) < 1e-6


def test_entries_are_those_of_the_definition() -> None:
    """In `delta`, by the keys: dropped, rescaled by each adapter's own density, weighted."""
    densities, weights = [0.3, 0.9, 1.0], [1.0, -2.0, 0.5]
    adapters = [Adapter(a.name, a.factors, content_hash=a.name) for a in three()]
    merged = run(
        adapters,
        "dare_linear",
        "delta",
        weights=weights,
        adapter_parameters=[{"density": d} for d in densities],
        seed=5,
    )
    dense = [deltas(adapter) for adapter in adapters]
    expected = {}
    for module, (rows, cols) in SHAPES.items():
        keys = mask_keys(5, ["x", "y", "z"], [module])
        masks = keep_mask(keys, torch.tensor(densities)[None, :, None, None], slice(0, rows), slice(0, cols))[0]
        parts = [w * m * d[module] / p for w, m, d, p in zip(weights, masks, dense, densities, strict=True)]
        expected[module] = torch.stack(parts).sum(0)
    assert distance(merged, expected) < 1e-6


def test_rescale_can_be_left_out() -> None:
    with_it = run(three(), "dare_linear", "knots", parameters={"density": 0.25})
    without = run(three(), "dare_linear", "knots", parameters={"density": 0.25, "rescale": False, "lambda": 4.0})
    assert distance(without, with_it) < 1e-6


def test_no_official_case_is_left_out() -> None:
    assert len(MERGED) == len(STOCHASTIC["merged"]) >= 6


@each_cell
def test_l1_keeps_the_norm_of_every_draw(method: str, space: str) -> None:
    """As mergekit: Σ |x| of each task at each module, whatever was dropped. One adapter shows it; in `delta` it can be seen."""
    x = random_adapter("x", 4, 1, scaling=2.0)
    drawn = [run([x], method, space, parameters={"density": 0.4, "rescale": "l1"}, seed=seed) for seed in range(3)]
    assert distance(drawn[0], drawn[1]) > 0.1
    if space == "delta":
        for merged in drawn:
            for module, value in deltas(x).items():
                assert float(deltas(merged)[module].abs().sum()) == pytest.approx(float(value.abs().sum()), rel=1e-4)
    for module, plain in deltas(run([x], method, space, parameters={"density": 0.4})).items():
        own = deltas(drawn[0])[module]
        assert torch.allclose(own / own.norm(), plain / plain.norm(), atol=1e-5)  # the same mask, another factor


@each_cell
def test_seeds(method: str, space: str) -> None:
    zero, again, other = (run(three(), method, space, seed=seed) for seed in (0, 0, 1))
    assert zero.tensors_sha256 == again.tensors_sha256
    assert distance(other, zero) > 0.1


@each_cell
def test_tiles_do_not_matter(method: str, space: str) -> None:
    """A tiny workspace: strips of one or two lines in place of whole modules."""
    small = run(three(), method, space, workspace_bytes=1 << 13)
    assert distance(small, run(three(), method, space)) < 3e-6


@each_cell
def test_order_does_not_matter(method: str, space: str) -> None:
    x, y, z = three()
    parameters = [{"density": d} for d in (0.4, 0.5, 0.8)]
    one = run([x, y, z], method, space, weights=[0.5, 0.3, 0.9], adapter_parameters=parameters)
    two = run([z, x, y], method, space, weights=[0.9, 0.5, 0.3], adapter_parameters=[*parameters[2:], *parameters[:2]])
    assert distance(one, two) < 3e-6


@each_cell
def test_scaling_folded_into_b(method: str, space: str) -> None:
    folded = [map_factors(adapter, LoraFactors.folded) for adapter in three()]
    assert distance(run(folded, method, space), run(three(), method, space)) < 3e-6


@each_cell
def test_a_zero_adapter_is_dropped(method: str, space: str) -> None:
    merged = run([*three()[:2], zero_adapter(), three()[2]], method, space, weights=[1.0, 2.0, 9.0, 3.0])
    assert merged.tensors_sha256 == run(three(), method, space, weights=[1.0, 2.0, 3.0]).tensors_sha256


@each_cell
def test_copies_are_dropped_from(method: str, space: str) -> None:
    x = random_adapter("x", 4, 1)
    weights = [1 / 3] * 3 if method == "dare_linear" else None
    assert distance(run([x, x, x], method, space, weights=weights), x) > 0.3


@each_cell
def test_the_gauge_changes_the_hash_and_so_the_masks(method: str, space: str) -> None:
    other = [regauged(adapter, seed) for seed, adapter in enumerate(three())]
    assert distance(run(other, method, space), run(three(), method, space)) > 0.1


@pytest.mark.parametrize("space", ["delta", "knots"])
def test_the_gauge_does_not_matter_under_the_same_hash(space: str) -> None:
    adapters = [Adapter(a.name, a.factors, content_hash=a.name) for a in three()]
    other = [regauged(adapter, seed) for seed, adapter in enumerate(adapters)]
    assert distance(run(other, "dare_ties", space), run(adapters, "dare_ties", space)) < 2e-5


@pytest.mark.parametrize("case", HARD)
@each_cell
def test_hard_adapters(method: str, space: str, case: str) -> None:
    """Finite, of the right size, and of a rank that is Σ r_i at most where nothing is dense."""
    adapters = HARD[case]()
    merged = run(adapters, method, space)
    sums = {m: sum(a.factors[m].rank for a in adapters if m in a.factors) for m in merged.factors}
    assert set(merged.factors) == {m for a in adapters for m in a.factors}
    for module, factors in merged.factors.items():
        assert factors.rank <= min(*factors.shape, sums[module] if space != "delta" else factors.shape[0])
        largest = max(float(a.factors[module].delta().norm()) for a in adapters if module in a.factors)
        assert 0.2 * largest / len(adapters) < float(merged.delta(module).norm()) < 20 * largest


def test_sign_conflict_is_reported() -> None:
    x = random_adapter("x", 2, 1)
    opposite = Adapter("opposite", {m: LoraFactors(f.A, -f.B) for m, f in x.factors.items()})
    report = run([x, opposite], "dare_ties", "delta", parameters={"density": 0.5}).report
    # Of the entries that either keeps, a third are kept by both.
    assert all(value == pytest.approx(1 / 3, abs=0.06) for value in report.sign_conflict.values())
