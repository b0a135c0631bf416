# SPDX-License-Identifier: Apache-2.0
"""DOGE against a plain dense version of the definition, the golden cases, and what holds for it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import golden, golden_do
from tests.adapters_in_memory import SHAPES, deltas, distance, map_factors, random_adapter, three, zero_adapter
from tests.methods.cases import HARD, noisy, regauged
from tests.test_golden import relative_error
from vllm_merge import Adapter, LoraFactors, MergedAdapter, UserInputError, merge
from vllm_merge.algebra.shared_subspace import shared_subspace

GOLDEN = [entry for entry in golden.entries() if entry["method"].startswith("doge")]
DELTA = {"steps": 30, "learning_rate": 1e-3}
CELLS = [
    pytest.param("core", {}, id="core-rows"),
    pytest.param("core", {"loss": "matrix"}, id="core-matrix"),
    pytest.param("delta", DELTA, id="delta-rows"),
    pytest.param("delta", {**DELTA, "loss": "matrix"}, id="delta-matrix"),
]
each_cell = pytest.mark.parametrize(("space", "parameters"), CELLS)


def run(adapters: Sequence[Adapter], space: str, parameters: dict[str, Any], **more: Any) -> MergedAdapter:
    return merge(adapters, merge_method="doge", space=space, parameters=parameters, **{"rank": "lossless", **more})


@pytest.mark.parametrize("entry", GOLDEN, ids=lambda entry: entry["method"])
def test_golden(entry: golden.Entry) -> None:
    recipe = golden_do.recipe_for(entry)
    assert recipe is not None
    adapters, expected = golden.load_case(entry)
    merged = merge(adapters, rank="lossless", **recipe)
    assert relative_error(merged, expected) <= entry["tolerance"]
    assert merged.report.ranks == entry["result"]["numerical_rank_1e-6"]
    recipe["parameters"]["density"] += 0.01
    assert relative_error(merge(adapters, rank="lossless", **recipe), expected) > 50 * entry["tolerance"]


def dense_problem(adapters: Sequence[Adapter], module: str, weights: Sequence[float], loss: str) -> tuple[Any, ...]:
    """τ (n, d_out, d_in), λ (n, 1, 1), and the loss as a function of Δ."""
    tau = torch.stack([deltas(adapter)[module] for adapter in adapters])
    lam = 0.07 * torch.tensor(weights)[:, None, None] / tau.norm(dim=(1, 2), keepdim=True)

    def value(delta: Tensor) -> Tensor:
        inner = tau * (tau - (lam * tau).sum(0) - lam.sum() * delta)
        return (inner.sum(2) if loss == "rows" else inner.sum((1, 2))).square().sum()

    return tau, lam, value


def projector(tau: Tensor, ranks: Sequence[int], subspace: int) -> Tensor:
    """On the subspace that the tasks share, by dense singular value decompositions."""
    size = min(*tau.shape[1:], sum(ranks))
    vectors = [torch.linalg.svd(t).U[:, : min(rank, size // len(ranks))] for t, rank in zip(tau, ranks, strict=True)]
    u = torch.linalg.svd(torch.cat(vectors, 1), full_matrices=False).U[:, : size // subspace]
    return u @ u.T


@pytest.mark.parametrize("loss", ["rows", "matrix"])
@pytest.mark.parametrize("steps", [1, 7, 60])
def test_descent_is_that_of_the_dense_loss(loss: str, steps: int) -> None:
    """Every step goes down the projected gradient of the dense loss, and none leaves the LoRA's rank."""
    weights = [1.0, 0.5, 2.0]
    merged = run(three(), "core", {"loss": loss, "steps": steps, "subspace": 3}, weights=weights)
    expected = {}
    for module in SHAPES:
        tau, lam, value = dense_problem(three(), module, weights, loss)
        outside = torch.eye(tau.shape[1], dtype=torch.float64) - projector(tau, [3, 5, 2], 3)
        squares = tau.square().sum((0, 2) if loss == "rows" else (0, 1, 2)).max()
        delta = torch.zeros_like(tau[0])
        losses = []
        for _ in range(steps):
            delta.requires_grad_()
            losses.append(value(delta))
            (slope,) = torch.autograd.grad(losses[-1], delta)
            delta = delta.detach() - outside @ slope / (2 * lam.sum() ** 2 * squares)
        assert all(after <= before for before, after in itertools.pairwise(losses))
        assert value(delta) < losses[0]
        expected[module] = (lam * (tau + delta)).sum(0)
    assert distance(merged, expected) < 1e-6
    assert set(merged.report.ranks.values()) == {10}


@pytest.mark.parametrize("loss", ["rows", "matrix"])
def test_adam_and_mask_are_those_of_the_definition(loss: str) -> None:
    weights, density = [1.0, 0.5, 2.0], 0.25
    merged = run(three(), "delta", {**DELTA, "loss": loss, "density": density, "subspace": 3}, weights=weights)
    flat = [torch.cat([d.flatten() for d in deltas(adapter).values()]).abs() for adapter in three()]
    thresholds = torch.stack([f.sort(descending=True).values[int(len(f) * density)] for f in flat])[:, None, None]
    expected = {}
    for module in SHAPES:
        tau, lam, value = dense_problem(three(), module, weights, loss)
        outside = torch.eye(tau.shape[1], dtype=torch.float64) - projector(tau, [3, 5, 2], 3)
        delta = torch.zeros_like(tau[0], requires_grad=True)
        adam = torch.optim.Adam([delta], lr=DELTA["learning_rate"])
        for _ in range(int(DELTA["steps"])):
            (slope,) = torch.autograd.grad(value(delta), delta)
            delta.grad = outside @ slope
            adam.step()
        expected[module] = (lam * (tau + delta.detach()) * (tau.abs() >= thresholds - 1e-9)).sum(0)
    assert distance(merged, expected) < 2e-5


def test_all_tasks_have_the_same_length_in_it() -> None:
    """λ_i = c / ‖ΔW_i‖: an adapter ten thousand times as long weighs as much."""
    x, y = random_adapter("x", 4, 1), random_adapter("y", 4, 2)
    longer = map_factors(y, lambda f: LoraFactors(f.A, f.B, f.scaling * 1e4))
    own = {"loss": "matrix", "subspace": 1}  # everything is shared, so that the correction is 0
    assert distance(run([x, longer], "core", own), run([x, y], "core", own)) < 1e-6


def test_directions_that_are_equally_shared_stay_together() -> None:
    """Two copies share all of their directions alike; which came first is arbitrary, so none is left out."""
    x = random_adapter("x", 4, 1).factors["layers.0.q_proj"]
    a, b = torch.cat([x.A, x.A])[None].double(), torch.cat([x.B, x.B], 1)[None].double()
    shared = shared_subspace(b, a @ a.mT, [slice(0, 4), slice(4, 8)], 32, parts=6)
    assert shared.shape == (1, 24, 4)
    assert torch.allclose(shared @ shared.mT @ b, b, atol=1e-10)


@each_cell
def test_copies_do_not_give_the_adapter(space: str, parameters: dict[str, Any]) -> None:
    x = random_adapter("x", 4, 1)
    assert distance(run([x, x, x], space, parameters), x) > 0.1


@each_cell
def test_order_does_not_matter(space: str, parameters: dict[str, Any]) -> None:
    x, y, z = three()
    one = run([x, y, z], space, parameters, weights=[0.5, 0.3, 0.9])
    assert distance(run([z, x, y], space, parameters, weights=[0.9, 0.5, 0.3]), one) < 5e-6


@each_cell
def test_scaling_folded_into_b(space: str, parameters: dict[str, Any]) -> None:
    folded = [map_factors(adapter, LoraFactors.folded) for adapter in three()]
    assert distance(run(folded, space, parameters), run(three(), space, parameters)) < 5e-6


@each_cell
def test_the_gauge_does_not_matter(space: str, parameters: dict[str, Any]) -> None:
    other = [regauged(adapter, seed) for seed, adapter in enumerate(three())]
    assert distance(run(other, space, parameters), run(three(), space, parameters)) < 2e-5


@each_cell
def test_a_zero_adapter_is_dropped(space: str, parameters: dict[str, Any]) -> None:
    merged = run([*three()[:2], zero_adapter(), three()[2]], space, parameters, weights=[1.0, 2.0, 9.0, 3.0])
    assert merged.tensors_sha256 == run(three(), space, parameters, weights=[1.0, 2.0, 3.0]).tensors_sha256


@each_cell
def test_the_same_call_gives_the_same_bytes(space: str, parameters: dict[str, Any]) -> None:
    assert run(three(), space, parameters).tensors_sha256 == run(three(), space, parameters).tensors_sha256


@each_cell
def test_tiles_do_not_matter(space: str, parameters: dict[str, Any]) -> None:
    small = run(three(), space, parameters, workspace_bytes=1 << 15)
    assert distance(small, run(three(), space, parameters)) < 5e-6


@pytest.mark.parametrize("case", HARD)
@each_cell
def test_hard_adapters(space: str, parameters: dict[str, Any], case: str) -> None:
    adapters = HARD[case]()
    merged = run(adapters, space, parameters)
    assert set(merged.factors) == {m for a in adapters for m in a.factors}
    for module, rank in merged.report.ranks.items():
        sums = sum(a.factors[module].rank for a in adapters if module in a.factors)
        assert rank <= min(*SHAPES[module], sums if space == "core" else SHAPES[module][0])
    other = [noisy(adapter, seed) for seed, adapter in enumerate(adapters)]
    assert distance(run(other, space, parameters), merged) < 1e-6


def test_a_module_that_is_too_large_for_adam() -> None:
    with pytest.raises(UserInputError, match=r"module 'layers.0.q_proj' \(24 × 32\) needs .* use space 'core'"):
        run(three(), "delta", DELTA, workspace_bytes=12_000)
