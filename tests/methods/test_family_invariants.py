# SPDX-License-Identifier: Apache-2.0
"""Which invariants hold for the methods people know from mergekit, and what they do on inputs that are hard for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.adapters_in_memory import SHAPES, deltas, distance, map_factors, random_adapter, three, zero_adapter
from tests.methods.cases import HARD, changed, duplicates, noisy, regauged, shared_a
from tests.methods.family import CASES, ENTRYWISE, RANDOM, SPHERICAL, run, taken
from vllm_merge import Adapter, LoraFactors, merge

TOLERANCE = 3e-6
EVERY = pytest.mark.parametrize("case", CASES)
SUMS = ("magnitude_prune", "breadcrumbs", "consensus", "della_linear", "dare_linear")  # of which copies add up


def third(case: str) -> list[float] | None:
    """Weights for three copies that leave a sum as one of them."""
    return [1 / 3] * 3 if CASES[case][0] in SUMS else None


KEEPS_COPIES = [case for case in CASES if CASES[case][0] in ("sce", "emr_unified", "consensus")]


@pytest.mark.parametrize("case", [*SPHERICAL, *KEEPS_COPIES, "nearswap-delta"])
def test_copies_give_the_adapter(case: str) -> None:
    """SCE too: copies differ nowhere, so that there is nothing to select."""
    x = random_adapter("x", 4, 1, scaling=2.0)
    merged = run(case, taken(case, [x, x, x]), weights=third(case))
    assert distance(merged, x) < TOLERANCE
    if CASES[case][1] != "delta":
        assert merged.rank == 4


@pytest.mark.parametrize("case", [case for case in CASES if CASES[case][0] in ("ram", "ram_plus")])
def test_ram_of_copies_loses_what_is_below_its_threshold(case: str) -> None:
    x = random_adapter("x", 4, 1)
    assert distance(run(case, [x, x, x], parameters={"epsilon": 0.0}), x) < TOLERANCE
    assert distance(run(case, [x, x, x], parameters={"epsilon": 1.0}), x) > 0.1


@pytest.mark.parametrize("method", ["magnitude_prune", "breadcrumbs", "breadcrumbs_ties"])
@pytest.mark.parametrize("space", ["delta", "knots", "core"])
def test_copies_are_trimmed_below_density_1(method: str, space: str) -> None:
    x = random_adapter("x", 4, 1)
    arguments: dict[str, Any] = {"merge_method": method, "space": space, "weights": [1 / 3] * 3, "rank": "lossless"}
    assert distance(merge([x, x, x], parameters={"density": 1.0}, **arguments), x) < TOLERANCE
    few = 0.05 if space == "core" else 0.2  # a copy's core is nearly diagonal
    assert distance(merge([x, x, x], parameters={"density": few}, **arguments), x) > 1e-2


@pytest.mark.parametrize("case", ["pcb-delta", "pcb-knots"])
def test_pcb_of_copies_keeps_few_entries(case: str) -> None:
    """All copies have the same shares, so that the entries outside the best share become 0: no copy of x."""
    x = random_adapter("x", 4, 1)
    merged = run(case, [x, x, x])
    assert distance(merged, x) > 0.1
    if CASES[case][1] == "delta":
        kept = torch.cat([(deltas(merged)[module].abs() > 1e-6).flatten() for module in SHAPES])
        assert float(kept.double().mean()) == pytest.approx(0.2, abs=0.01)


@pytest.mark.parametrize("case", RANDOM)
def test_copies_of_one_identity_drop_the_same(case: str) -> None:
    """And of several: the mean of copies is not x, because each drops at random."""
    x = random_adapter("x", 4, 1)
    assert distance(run(case, [x, x, x], weights=third(case)), x) > 0.1


@pytest.mark.parametrize("case", sorted(set(CASES) - {"slerp", "nearswap-delta"}))
def test_order_does_not_matter(case: str) -> None:
    adapters = taken(case, three())
    weights = [0.5, 0.3, 0.9][: len(adapters)]
    one, two = run(case, adapters, weights=weights), run(case, adapters[::-1], weights=weights[::-1])
    assert distance(one, two) < TOLERANCE


def test_order_matters_to_those_that_go_from_one_to_another() -> None:
    x, y, _ = three()
    for method, parameters in (("slerp", {"t": 0.3}), ("nearswap", {"t": 0.01})):
        arguments: dict[str, Any] = {"merge_method": method, "rank": "lossless", "parameters": parameters}
        assert distance(merge([x, y], **arguments), merge([y, x], **arguments)) > 1e-2
    halfway: dict[str, Any] = {"merge_method": "slerp", "parameters": {"t": 0.5}}
    assert distance(merge([x, y], **halfway), merge([y, x], **halfway)) < TOLERANCE


@EVERY
def test_scaling_folded_into_b(case: str) -> None:
    adapters = taken(case, three())
    folded = [changed(adapter, LoraFactors.folded) for adapter in adapters]
    assert distance(run(case, folded), run(case, adapters)) < TOLERANCE


@pytest.mark.parametrize("case", [case for case in CASES if case in SPHERICAL or CASES[case][1] != "core"])
def test_gauge_does_not_matter(case: str) -> None:
    """Under the same identity, of which random masks are drawn."""
    adapters = taken(case, three())
    other = [regauged(adapter, seed) for seed, adapter in enumerate(adapters)]
    assert distance(run(case, other), run(case, adapters)) < 2e-5


@pytest.mark.parametrize("case", [case for case in ENTRYWISE if CASES[case][1] == "core"])
def test_the_gauge_changes_the_bases_of_core(case: str) -> None:
    other = [regauged(adapter, seed) for seed, adapter in enumerate(three())]
    assert distance(run(case, other), run(case, three())) > 1e-2


@EVERY
def test_a_zero_adapter_is_dropped(case: str) -> None:
    x, y, *rest = taken(case, three())
    weights = [1.0, 2.0, 3.0][: 2 + len(rest)]
    merged = run(case, [x, zero_adapter(), y, *rest], weights=[weights[0], 9.0, *weights[1:]])
    assert merged.report.dropped_adapters == ["zero"]
    assert merged.tensors_sha256 == run(case, [x, y, *rest], weights=weights).tensors_sha256


@pytest.mark.parametrize("adapters", [duplicates, shared_a])
@EVERY
def test_noise_of_rounding_moves_nothing(case: str, adapters: Any) -> None:
    clean = taken(case, adapters())
    other = [noisy(adapter, seed) for seed, adapter in enumerate(clean)]
    assert distance(run(case, other), run(case, clean)) < 1e-6


@EVERY
def test_the_same_call_gives_the_same_bytes(case: str) -> None:
    adapters = taken(case, three())
    assert run(case, adapters).tensors_sha256 == run(case, adapters).tensors_sha256


@EVERY
def test_how_the_work_is_cut_does_not_matter(case: str) -> None:
    """A tiny workspace: strips of one or two lines in place of whole modules, and batches of one module."""
    adapters = taken(case, three())
    assert distance(run(case, adapters, workspace_bytes=1 << 13), run(case, adapters)) < TOLERANCE


@EVERY
def test_one_adapter_is_what_the_rule_makes_of_it(case: str) -> None:
    """Nothing to interpolate, agree or compete with: the adapter itself, or its trimmed entries."""
    x = random_adapter("x", 4, 1, scaling=2.0)
    merged, method = run(case, [x]), CASES[case][0]
    if case in SPHERICAL or method in ("sce", "emr_unified", "consensus", "nearswap"):
        assert distance(merged, x) < TOLERANCE
    else:
        assert 0.05 < distance(merged, x) < 3


@pytest.mark.parametrize("hard", HARD)
@EVERY
def test_hard_adapters(case: str, hard: str) -> None:
    """Finite, no larger than the tasks together, and of a rank that is Σ r_i at most where nothing is dense."""
    adapters = taken(case, HARD[hard]())
    merged = run(case, adapters)
    sums = {m: sum(a.factors[m].rank for a in adapters if m in a.factors) for m in merged.factors}
    assert set(merged.factors) <= {m for a in adapters for m in a.factors}
    assert merged.factors
    for module, factors in merged.factors.items():
        delta = merged.delta(module)
        assert bool(delta.isfinite().all())
        assert factors.rank <= min(*factors.shape, sums[module] if CASES[case][1] != "delta" else factors.shape[0])
        total = sum(float(a.factors[module].delta().norm()) for a in adapters if module in a.factors)
        assert float(delta.norm()) < (6 if case in RANDOM else 1.6) * total


@pytest.mark.parametrize("case", [case for case in CASES if CASES[case][0] not in ("pcb", "nearswap")])
@pytest.mark.parametrize("scale", [2.0**-16, 2.0**13])
def test_the_scale_of_all_adapters_is_that_of_the_result(case: str, scale: float) -> None:
    """No absolute threshold: powers of two, which change no rounding."""

    def scaled(adapter: Adapter) -> Adapter:
        return changed(adapter, lambda f: LoraFactors(f.A, f.B * scale, f.scaling))

    adapters = taken(case, three())
    merged = run(case, [scaled(adapter) for adapter in adapters])
    expected = map_factors(run(case, adapters).as_adapter(), lambda f: LoraFactors(f.A, f.B * scale, f.scaling))
    assert distance(merged, expected) < TOLERANCE


def test_pcb_depends_on_the_scale_where_products_of_entries_are_near_1() -> None:
    def scaled(scale: float) -> dict[str, torch.Tensor]:
        adapters = [map_factors(a, lambda f: LoraFactors(f.A, f.B * scale, f.scaling)) for a in three()]
        merged = deltas(merge(adapters, merge_method="pcb", space="delta", rank="lossless"))
        return {module: value / scale for module, value in merged.items()}

    assert distance(scaled(1e-4), scaled(1e-3)) < 1e-3
    assert distance(scaled(1e-3), scaled(1e2)) > 0.1
