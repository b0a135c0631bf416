# SPDX-License-Identifier: Apache-2.0
"""Which invariants hold for which method: by property where they hold, by a counterexample where they do not."""

from __future__ import annotations

from typing import Any

import pytest

from tests.adapters_in_memory import distance, map_factors, random_adapter, three, zero_adapter
from tests.methods.cases import duplicates, noisy, regauged, shared_a
from vllm_merge import Adapter, LoraFactors, MergedAdapter, merge

TOLERANCE = 3e-6
LINEAR = [
    pytest.param(method, space, {}, id=f"{method}-{space}")
    for method in ("linear", "task_arithmetic")
    for space in ("core", "delta", "knots")
]
TIES_FULL = [
    pytest.param("ties", space, {"density": 1.0}, id=f"ties-{space}-1") for space in ("delta", "knots", "core")
]
TIES_TRIM = [pytest.param("ties", space, {"density": 0.3}, id=f"ties-{space}-0.3") for space in ("delta", "knots")]
CORE_TRIM = [pytest.param("ties", "core", {"density": 0.05}, id="ties-core-0.05")]
ALL = [*LINEAR, *TIES_FULL, *TIES_TRIM, *CORE_TRIM]


def run(adapters: list[Adapter], method: str, space: str, parameters: dict[str, Any], **more: Any) -> MergedAdapter:
    return merge(adapters, merge_method=method, space=space, parameters=parameters, rank="lossless", **more)


@pytest.mark.parametrize(("method", "space", "parameters"), [*LINEAR, *TIES_FULL])
def test_copies_give_the_adapter(method: str, space: str, parameters: dict[str, Any]) -> None:
    x = random_adapter("x", 4, 1, scaling=2.0)
    weights = [1 / 3] * 3 if method == "task_arithmetic" else None
    merged = run([x, x, x], method, space, parameters, weights=weights)
    assert distance(merged, x) < TOLERANCE
    assert merged.rank == 4


@pytest.mark.parametrize(("method", "space", "parameters"), [*TIES_TRIM, *CORE_TRIM])
def test_copies_are_trimmed(method: str, space: str, parameters: dict[str, Any]) -> None:
    x = random_adapter("x", 4, 1)
    assert distance(run([x, x, x], method, space, parameters), x) > 1e-2


@pytest.mark.parametrize(("method", "space", "parameters"), ALL)
def test_order_does_not_matter(method: str, space: str, parameters: dict[str, Any]) -> None:
    x, y, z = three()
    one = run([x, y, z], method, space, parameters, weights=[0.5, 0.3, 0.9])
    two = run([z, x, y], method, space, parameters, weights=[0.9, 0.5, 0.3])
    assert distance(one, two) < TOLERANCE


@pytest.mark.parametrize(("method", "space", "parameters"), ALL)
def test_scaling_folded_into_b(method: str, space: str, parameters: dict[str, Any]) -> None:
    folded = [map_factors(adapter, LoraFactors.folded) for adapter in three()]
    assert distance(run(folded, method, space, parameters), run(three(), method, space, parameters)) < TOLERANCE


@pytest.mark.parametrize(("method", "space", "parameters"), [*LINEAR, *TIES_TRIM, *TIES_FULL[:2]])
def test_gauge_does_not_matter(method: str, space: str, parameters: dict[str, Any]) -> None:
    other = [regauged(adapter, seed) for seed, adapter in enumerate(three())]
    assert distance(run(other, method, space, parameters), run(three(), method, space, parameters)) < 2e-5


@pytest.mark.parametrize(("method", "space", "parameters"), [TIES_FULL[2], *CORE_TRIM])
def test_core_ties_depends_on_the_gauge(method: str, space: str, parameters: dict[str, Any]) -> None:
    other = [regauged(adapter, seed) for seed, adapter in enumerate(three())]
    assert distance(run(other, method, space, parameters), run(three(), method, space, parameters)) > 1e-2


@pytest.mark.parametrize(("method", "space", "parameters"), ALL)
def test_a_zero_adapter_is_dropped(method: str, space: str, parameters: dict[str, Any]) -> None:
    merged = run([*three()[:2], zero_adapter(), three()[2]], method, space, parameters, weights=[1.0, 2.0, 9.0, 3.0])
    assert merged.report.dropped_adapters == ["zero"]
    alone = run(three(), method, space, parameters, weights=[1.0, 2.0, 3.0])
    assert merged.tensors_sha256 == alone.tensors_sha256


@pytest.mark.parametrize("adapters", [duplicates, shared_a])
@pytest.mark.parametrize(("method", "space", "parameters"), ALL)
def test_noise_of_rounding_moves_nothing(adapters: Any, method: str, space: str, parameters: dict[str, Any]) -> None:
    clean = adapters()
    other = [noisy(adapter, seed) for seed, adapter in enumerate(clean)]
    assert distance(run(other, method, space, parameters), run(clean, method, space, parameters)) < 1e-6


@pytest.mark.parametrize(("method", "space", "parameters"), ALL)
def test_the_same_call_gives_the_same_bytes(method: str, space: str, parameters: dict[str, Any]) -> None:
    assert (
        run(three(), method, space, parameters).tensors_sha256 == run(three(), method, space, parameters).tensors_sha256
    )
