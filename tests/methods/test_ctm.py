# SPDX-License-Identifier: Apache-2.0
"""CtM: its rank, its rules, and its bases when they are iterated to convergence."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests import golden
from tests.adapters_in_memory import SHAPES, deltas, distance, random_adapter, three
from tests.test_golden import relative_error
from vllm_merge import Adapter, MergedAdapter, merge
from vllm_merge.methods import ctm

CASES = [entry for entry in golden.entries() if "rel_diff_of_fully_converged_hooi" in entry["result"]]


def run(adapters: list[Adapter], **parameters: Any) -> MergedAdapter:
    return merge(adapters, merge_method="ctm", parameters=parameters, rank="lossless")


@pytest.mark.parametrize("entry", CASES, ids=lambda entry: entry["file"].removesuffix(".safetensors"))
def test_golden_cases_with_converged_bases(entry: golden.Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctm, "STOP", 1e-13)
    adapters, expected = golden.load_case(entry)
    recipe = golden.recipe_for(entry)
    assert recipe is not None
    error = relative_error(merge(adapters, **recipe), expected)
    assert error <= entry["result"]["tolerance_if_hooi_is_run_to_convergence"]
    assert error == pytest.approx(entry["result"]["rel_diff_of_fully_converged_hooi"], rel=0.1)


@pytest.mark.parametrize("rule", list(ctm.RULES))
@pytest.mark.parametrize("rank", [1, 4, 7])
def test_the_result_has_the_target_rank(rule: str, rank: int) -> None:
    assert set(run(three(), rule=rule, density=1.0, target_rank=rank).report.ranks.values()) == {rank}


def test_the_target_rank_is_that_of_the_module() -> None:
    x, y, z = three()
    small = {m: f for m, f in y.factors.items() if "q_proj" in m}
    ranks = run([x, Adapter("y", small), z]).report.ranks
    assert {module: ranks[module] for module in SHAPES} == {m: 5 if "q_proj" in m else 3 for m in SHAPES}


def test_bases_of_full_rank_change_nothing() -> None:
    weights = [0.5, 2.0, -0.7]
    arguments = {"weights": weights, "rank": "lossless"}
    merged = merge(three(), merge_method="ctm", parameters={"rule": "sum", "target_rank": 32}, **arguments)
    assert distance(merged, merge(three(), merge_method="task_arithmetic", **arguments)) < 1e-6
    mean = merge(three(), merge_method="ctm", parameters={"rule": "mean", "target_rank": 32}, **arguments)
    assert distance(merged, {m: delta * 3.2 for m, delta in deltas(mean).items()}) < 1e-6


@pytest.mark.parametrize("rank", [2, 4])
def test_the_bases_beat_truncation_at_what_all_tasks_keep(rank: int) -> None:
    """Σ ‖Uᵀ ΔW_i V‖² is larger in the shared bases than in the leading singular vectors of the sum."""
    adapters = [random_adapter(str(seed), 4, seed) for seed in range(4)]
    total = merge(adapters, merge_method="task_arithmetic", rank=rank)
    ours = run(adapters, rule="sum", target_rank=rank, beta=1.0)
    for module in SHAPES:
        kept = []
        for merged in (ours, total):
            u, _ = torch.linalg.qr(merged.factors[module].B.double())
            v, _ = torch.linalg.qr(merged.factors[module].A.double().mT)
            kept.append(sum(float((u.mT @ deltas(a)[module] @ v).square().sum()) for a in adapters))
        assert kept[0] > kept[1]


def test_beta_weighs_small_tasks_up() -> None:
    large, small = random_adapter("large", 2, 1, size=10.0), random_adapter("small", 2, 2)

    def kept(beta: float) -> float:
        merged = run([large, small], rule="sum", target_rank=2, beta=beta)
        factors = merged.factors["layers.0.q_proj"]
        u, _ = torch.linalg.qr(factors.B.double())
        return float((u.mT @ deltas(small)["layers.0.q_proj"]).norm())

    assert kept(0.0) > 2 * kept(1.0)


def test_trimming_keeps_the_largest_coordinates() -> None:
    """One task: ⌊16 · 0.25⌋ + 1 = 5 of the 4 × 4 coordinates, here the diagonal, is all there is."""
    x = random_adapter("x", 4, 1)
    assert distance(run([x], density=0.25), x) < 1e-6
    assert distance(run([x], density=0.2), x) < 1e-6  # 4 of 16
    assert distance(run([x], density=0.18), x) > 1e-2  # 3 of 16


def test_dare_draws_with_the_seed() -> None:
    def merged(seed: int) -> MergedAdapter:
        parameters = {"rule": "dare_ties", "density": 0.5}
        return merge(three(), merge_method="ctm", parameters=parameters, seed=seed, rank="lossless")

    assert merged(1).tensors_sha256 == merged(1).tensors_sha256
    assert distance(merged(1), merged(2)) > 1e-2
    assert distance(run(three(), rule="dare_ties", density=1.0), run(three(), density=1.0)) < 1e-6
