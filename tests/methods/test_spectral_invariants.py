# SPDX-License-Identifier: Apache-2.0
"""Which invariants hold for TSV-M, Iso-C, Iso-CTS, OPCM and CtM, and what they do on inputs that are hard for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.adapters_in_memory import SHAPES, deltas, distance, map_factors, random_adapter, three, zero_adapter
from tests.methods.cases import (
    HARD,
    SPECTRAL,
    changed,
    duplicates,
    identified,
    noisy,
    norms_apart,
    regauged,
    shared_a,
)
from vllm_merge import Adapter, LoraFactors, MergedAdapter, merge

TOLERANCE = 3e-6
ALL = pytest.mark.parametrize("case", SPECTRAL)


def run(case: str, adapters: list[Adapter], **more: Any) -> MergedAdapter:
    method, parameters = SPECTRAL[case]
    return merge(adapters, **{"merge_method": method, "parameters": parameters, "rank": "lossless", **more})


@pytest.mark.parametrize(
    "case", ["tsv_m", "opcm", "opcm-shuffle", "ctm-ties-1", "ctm-mean", "wudi", "svc", "svc-sum", "svc-tsv_m"]
)
def test_copies_give_the_adapter(case: str) -> None:
    """OPCM too: what a copy adds is diagonal in the singular vectors of what is merged, and so removed whole."""
    x = random_adapter("x", 4, 1, scaling=2.0)
    merged = run(case, [x, x, x])
    assert distance(merged, x) < TOLERANCE
    assert merged.rank == 4


@pytest.mark.parametrize(
    "case",
    [
        "tsv_m-isotropize",
        "iso_c",
        "iso_cts",
        "ctm-ties",
        "ctm-sum",
        "ctm-dare_ties",
        "dc_merge",
        "dc_merge-linear",
        "wudi-steps",
    ],
)
def test_copies_do_not_give_the_adapter(case: str) -> None:
    x = random_adapter("x", 4, 1)
    few = {"weights": None} if case != "ctm-ties" else {"parameters": {"density": 0.1}}
    assert distance(run(case, [x, x, x], **few), x) > 1e-2


def test_ctm_of_copies_cuts_to_its_rank() -> None:
    x = random_adapter("x", 4, 1)
    merged = merge([x, x], merge_method="ctm", parameters={"density": 1.0, "target_rank": 2})
    for module, delta in deltas(x).items():
        u, s, v = torch.linalg.svd(delta)
        best = u[:, :2] * s[:2] @ v[:2]
        assert float((merged.delta(module) - best).norm() / best.norm()) < 1e-5


@pytest.mark.parametrize("case", sorted(set(SPECTRAL) - {"opcm", "opcm-shuffle"}))
def test_order_does_not_matter(case: str) -> None:
    x, y, z = three()
    one, two = run(case, [x, y, z], weights=[0.5, 0.3, 0.9]), run(case, [z, x, y], weights=[0.9, 0.5, 0.3])
    assert distance(one, two) < TOLERANCE


def test_order_matters_to_opcm() -> None:
    x, y, z = three()
    assert distance(run("opcm", [x, y, z]), run("opcm", [z, x, y])) > 1e-2


@ALL
def test_scaling_folded_into_b(case: str) -> None:
    folded = [map_factors(adapter, LoraFactors.folded) for adapter in three()]
    assert distance(run(case, folded), run(case, three())) < TOLERANCE


@ALL
def test_gauge_does_not_matter(case: str) -> None:
    same = identified(three())
    other = [regauged(adapter, seed) for seed, adapter in enumerate(same)]
    assert distance(run(case, other), run(case, same)) < 2e-5


def test_masks_depend_on_the_gauge() -> None:
    """DARE's masks go by the adapter's content, which changes with it."""
    other = [regauged(adapter, seed) for seed, adapter in enumerate(three())]
    assert distance(run("ctm-dare_ties", other), run("ctm-dare_ties", three())) > 1e-2


@ALL
def test_a_zero_adapter_is_dropped(case: str) -> None:
    weights = [1.0, 2.0, 9.0, 3.0]
    merged = run(case, [*three()[:2], zero_adapter(), three()[2]], weights=weights)
    assert merged.report.dropped_adapters == ["zero"]
    assert merged.tensors_sha256 == run(case, three(), weights=[1.0, 2.0, 3.0]).tensors_sha256


@ALL
def test_a_weight_multiplies_the_adapter(case: str) -> None:
    """For all but the means, which divide by the weights again."""
    if case in ("ctm-ties", "ctm-ties-1", "ctm-mean", "ctm-dare_ties"):
        return
    weights = [2.0, 0.5, -1.0]
    scaled = [
        Adapter(a.name, {m: LoraFactors(f.A, f.B, f.scaling * w) for m, f in a.factors.items()})
        for a, w in zip(three(), weights, strict=True)
    ]
    assert distance(run(case, three(), weights=weights), run(case, scaled)) < TOLERANCE


@ALL
def test_the_same_call_gives_the_same_bytes(case: str) -> None:
    assert run(case, three(), seed=3).tensors_sha256 == run(case, three(), seed=3).tensors_sha256


@pytest.mark.parametrize("adapters", [duplicates, shared_a])
@ALL
def test_noise_of_rounding_moves_nothing(case: str, adapters: Any) -> None:
    clean = identified(adapters())
    other = [noisy(adapter, seed) for seed, adapter in enumerate(clean)]
    assert distance(run(case, other), run(case, clean)) < 1e-6


@pytest.mark.parametrize("adapters", HARD)
@ALL
def test_hard_inputs(case: str, adapters: str) -> None:
    """Finite, of a rank that a LoRA can have, at the modules that any adapter has, in proportion to its inputs."""
    given = HARD[adapters]()
    merged = run(case, given)
    assert set(merged.factors) == {module for adapter in given for module in adapter.factors}
    largest = SPECTRAL[case][1].get("target_rank") if case.startswith("ctm") else None
    for module, factors in merged.factors.items():
        ranks = [adapter.factors[module].rank for adapter in given if module in adapter.factors]
        assert factors.rank <= min(*SHAPES[module], sum(ranks))
        if case.startswith("ctm"):
            assert factors.rank <= (largest or max(ranks))
        norms = merged.report.input_norms[module]
        size = float(factors.delta().norm())
        assert 0 < size < 10 * sum(norms)


@ALL
def test_the_result_grows_with_the_adapters(case: str) -> None:
    """Nothing has an absolute threshold."""
    same = identified(three())
    merged = run(case, [changed(a, lambda f: LoraFactors(f.A, f.B * 2.0**-20, f.scaling)) for a in same])
    grown = {module: factors.delta().double() * 2.0**20 for module, factors in merged.factors.items()}
    assert distance(grown, run(case, same)) < TOLERANCE


@pytest.mark.parametrize("case", ["tsv_m", "opcm", "ctm-sum"])
def test_a_small_adapter_survives_beside_a_large_one(case: str) -> None:
    """Its own directions are there still: projected on them, the merge differs from that without it."""
    with_it, without = run(case, norms_apart()), run(case, norms_apart()[:2])
    small = norms_apart()[2]
    for module, factors in small.factors.items():
        u, _ = torch.linalg.qr(factors.B.double())
        v, _ = torch.linalg.qr(factors.A.double().mT)
        change = u.mT @ (with_it.delta(module).double() - without.delta(module).double()) @ v
        assert float(change.norm()) > 0.1 * float(factors.delta().norm())


@pytest.mark.parametrize("workspace", [1 << 18, 1 << 14, 1])
@ALL
def test_a_small_workspace_gives_the_same_result(case: str, workspace: int) -> None:
    assert distance(run(case, three(), workspace_bytes=workspace), run(case, three())) < TOLERANCE


@ALL
def test_a_smaller_rank_is_the_best_approximation(case: str) -> None:
    full, cut = run(case, three()), run(case, three(), rank=2)
    for module in full.factors:
        u, s, v = torch.linalg.svd(full.delta(module).double())
        best = u[:, :2] * s[:2] @ v[:2]
        # A flat spectrum has many best approximations, all of one error.
        error = float((full.delta(module).double() - cut.delta(module).double()).norm())
        assert error == pytest.approx(float((full.delta(module).double() - best).norm()), rel=1e-4)
