# SPDX-License-Identifier: Apache-2.0
"""Weighted sums whose terms fit into the rank: the adapters' own factors side by side, not a decomposition of their sum."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.adapters_in_memory import SHAPES, distance, map_factors, random_adapter, three, weighted_sum
from vllm_merge import Adapter, LoraFactors, MergeCancelled, MergedAdapter, MergeError, UserInputError, merge

WEIGHTS = [0.7, 0.25, -0.4]


def summed(adapters: list[Adapter], weights: list[float] | None = None, **arguments: Any) -> MergedAdapter:
    return merge(adapters, merge_method="task_arithmetic", weights=weights, **arguments)


def is_side_by_side(merged: MergedAdapter, adapters: list[Adapter]) -> bool:
    """Whether the rows of every A are the rows of the adapters' A, one below the other."""
    return all(
        torch.equal(factors.A, torch.cat([a.factors[module].A for a in adapters if module in a.factors]))
        for module, factors in merged.factors.items()
    )


def test_the_adapters_own_factors_are_the_result() -> None:
    """To the bit, with weight, λ and scaling in B."""
    adapters = three()
    merged = summed(adapters, WEIGHTS, parameters={"lambda": 0.5})
    assert is_side_by_side(merged, adapters)
    for module, factors in merged.factors.items():
        parts = zip(adapters, WEIGHTS, strict=True)
        scaled = [0.5 * w * a.factors[module].scaling * a.factors[module].B for a, w in parts]
        assert torch.allclose(factors.B, torch.cat(scaled, dim=1), rtol=1e-6, atol=0)
        assert factors.scaling == 1.0
    assert distance(merged, weighted_sum(adapters, [0.5 * w for w in WEIGHTS])) < 1e-6


@pytest.mark.parametrize(
    ("rank", "max_rank", "beside"),
    [
        ("auto", None, True),
        ("auto", 10, True),
        ("auto", 64, True),
        ("auto", 9, False),
        (10, None, True),
        (9, None, False),
        (64, 9, False),
        ("lossless", None, False),
        ("lossless", 64, False),
        ({"energy": 1.0}, None, False),
        ({"energy": 0.9}, 64, False),
    ],
)
def test_only_where_every_term_fits_and_no_smaller_rank_is_asked_for(rank: Any, max_rank: Any, beside: bool) -> None:
    merged = summed(three(), WEIGHTS, rank=rank, max_rank=max_rank)
    assert is_side_by_side(merged, three()) == beside
    bound = 10 if max_rank is None else min(10, max_rank)
    assert all(factors.rank <= bound for factors in merged.factors.values())
    if beside:
        assert set(merged.report.ranks.values()) == {10}
        assert set(merged.report.energy_kept.values()) == {None}


@pytest.mark.parametrize("space", ["delta", "knots"])
def test_other_spaces_decompose(space: str) -> None:
    assert not is_side_by_side(summed(three(), WEIGHTS, space=space), three())


def test_the_mean_too() -> None:
    merged = merge(three(), merge_method="linear", weights=[1.0, 2.0, 5.0])
    assert is_side_by_side(merged, three())
    assert distance(merged, weighted_sum(three(), [0.125, 0.25, 0.625])) < 1e-6


@pytest.mark.parametrize("known", [True, False])
def test_like_terms_are_added_up(known: bool) -> None:
    """The same content under two names (by its hash), or the same adapter twice, takes its rank once."""
    x, y = random_adapter("x", 3, 1), random_adapter("y", 5, 2)
    if known:
        x, again = (Adapter(name, x.factors, content_hash="one content") for name in ("x", "again"))
    else:
        again = x
    merged = summed([x, y, again], [1.0, 2.0, -0.25])
    assert is_side_by_side(merged, [x, y])
    assert distance(merged, weighted_sum([x, y], [0.75, 2.0])) < 1e-6


def test_terms_that_add_up_to_nothing_take_no_rank() -> None:
    x, y = random_adapter("x", 3, 1), random_adapter("y", 5, 2)
    merged = summed([x, y, x], [1.0, 2.0, -1.0])
    assert is_side_by_side(merged, [y])
    assert is_side_by_side(summed([x, y], [0.0, 1.0]), [y])
    gone = summed([x, x], [1.0, -1.0], report="brief")
    assert gone.factors == {}
    assert sorted(gone.report.dropped_modules) == sorted(SHAPES)


def test_a_weight_that_is_zero_at_some_modules_is_exact_at_all() -> None:
    x, y = random_adapter("x", 3, 1), random_adapter("y", 5, 2)
    merged = summed([x, y], parameters={"weight": 1.0}, adapter_parameters=[{"weight": {"layers.0.q_proj": 0.0}}, {}])
    expected = weighted_sum([x, y], [1.0, 1.0])
    expected["layers.0.q_proj"] = weighted_sum([x, y], [0.0, 1.0])["layers.0.q_proj"]
    assert distance(merged, expected) < 1e-6


def test_which_terms_a_module_has_does_not_depend_on_the_workspace() -> None:
    """Batches are as large as it allows; modules decide by themselves."""
    adapters = [random_adapter("x", 3, 1), random_adapter("y", 5, 2)]
    weights = [{"weight": {"layers.0.q_proj": 0.0}}, {"weight": {"layers.1.up_proj": 0.0}}]
    for report in ("brief", "full"):
        found = [
            summed(adapters, adapter_parameters=weights, workspace_bytes=nbytes, report=report)
            for nbytes in (2 << 30, 1 << 14, 1)
        ]
        assert len({merged.tensors_sha256 for merged in found}) == 1
        ranks = {"layers.0.q_proj": 5, "layers.0.up_proj": 8, "layers.1.q_proj": 8, "layers.1.up_proj": 3}
        assert found[0].report.ranks == ranks


def test_modules_that_some_lack_hold_no_padding() -> None:
    x, y, z = three()
    y = Adapter("y", {module: factors for module, factors in y.factors.items() if "up_proj" in module})
    merged = summed([x, y, z], WEIGHTS)
    assert is_side_by_side(merged, [x, y, z])
    assert {module: factors.rank for module, factors in merged.factors.items()} == {
        module: 10 if "up_proj" in module else 5 for module in SHAPES
    }
    assert distance(merged, weighted_sum([x, y, z], WEIGHTS)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_report_changes_no_byte_and_neither_does_the_workspace(dtype: torch.dtype) -> None:
    x, y, z = three()
    y = Adapter("y", {module: factors for module, factors in y.factors.items() if "up_proj" in module})
    full = summed([x, y, z, x], [*WEIGHTS, 0.1], dtype=dtype)
    for changes in ({"report": "brief"}, {"workspace_bytes": 1}, {"report": "brief", "workspace_bytes": 1}):
        assert summed([x, y, z, x], [*WEIGHTS, 0.1], dtype=dtype, **changes).tensors_sha256 == full.tensors_sha256
    assert set(full.report.norms) == set(full.report.ranks) == set(SHAPES)
    for module, norm in full.report.norms.items():
        assert norm == pytest.approx(float(full.delta(module).norm()), rel=1e-4 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("report", ["full", "brief"])
def test_what_is_not_finite_is_named(report: str) -> None:
    x, y, z = three()
    broken = dict(y.factors)
    bad = broken["layers.1.q_proj"].B.clone()
    bad[3, 1] = float("inf")
    broken["layers.1.q_proj"] = LoraFactors(broken["layers.1.q_proj"].A, bad)
    with pytest.raises(MergeError, match=r"adapter 'y', module 'layers.1.q_proj': .* not finite"):
        summed([x, Adapter("y", broken), z], report=report)
    with pytest.raises(MergeError, match=r"do not fit torch.float16"):
        summed([x, y, z], [1e12, 1.0, 1.0], dtype=torch.float16, report=report)


def test_it_can_be_cancelled_and_leaves_its_inputs_alone() -> None:
    adapters = three()
    before = [map_factors(a, lambda f: LoraFactors(f.A.clone(), f.B.clone(), f.scaling)) for a in adapters]
    with pytest.raises(MergeCancelled):
        summed(adapters, report="brief", cancelled=lambda: True)
    merged = summed(adapters, report="brief")
    for factors in merged.factors.values():
        factors.A.zero_()
        factors.B.zero_()
    for adapter, original in zip(adapters, before, strict=True):
        assert distance(adapter, original) == 0


def test_a_module_whose_only_owner_has_no_weight_is_dropped() -> None:
    x, y = random_adapter("x", 3, 1), random_adapter("y", 5, 2)
    y = Adapter("y", {module: factors for module, factors in y.factors.items() if "up_proj" in module})
    merged = summed([x, y], [0.0, 2.0], report="brief")
    assert is_side_by_side(merged, [y])
    assert sorted(merged.factors) == ["layers.0.up_proj", "layers.1.up_proj"]
    assert sorted(merged.report.dropped_modules) == ["layers.0.q_proj", "layers.1.q_proj"]
    assert distance(merged, weighted_sum([x, y], [0.0, 2.0])) < 1e-6


def test_merged_again_with_other_weights() -> None:
    """What is kept between merges of the same adapters has nothing of their weights."""
    adapters = three()
    for weights in (WEIGHTS, [1.0, 0.5, 2.0], WEIGHTS):
        merged = summed(adapters, weights, report="brief")
        assert list(merged.factors) == list(SHAPES)
        assert distance(merged, weighted_sum(adapters, weights)) < 1e-6
        assert merged.report.ranks == dict.fromkeys(SHAPES, 10)


def test_like_adapters_change_no_later_merge_with_these_weights() -> None:
    first, second, third = three()
    expected = summed([first, second, third], WEIGHTS)
    assert summed([first, first, second], WEIGHTS).rank == first.rank + second.rank
    again = summed([first, second, third], WEIGHTS)
    assert all(torch.equal(again.factors[m].B, pair.B) for m, pair in expected.factors.items())


def test_every_parameter_counts_in_merges_that_are_made_again_and_again() -> None:
    adapters, (module, *others) = three(), list(SHAPES)
    total = sum(WEIGHTS)
    for _ in range(2):
        for normalize, lam in ((True, 1.0), (False, 1.0), (False, 0.5), (True, 0.5)):
            parameters = {"normalize": normalize, "lambda": lam}
            merged = merge(adapters, merge_method="linear", weights=WEIGHTS, parameters=parameters)
            shares = [lam * w / (total if normalize else 1.0) for w in WEIGHTS]
            assert distance(merged, weighted_sum(adapters, shares)) < 1e-6
        by_module = {"lambda": {module: 0.5} | dict.fromkeys(others, 1.0), "normalize": False}
        merged = merge(adapters, merge_method="linear", weights=WEIGHTS, parameters=by_module)
        whole, half = weighted_sum(adapters, WEIGHTS), weighted_sum(adapters, [0.5 * w for w in WEIGHTS])
        for name, factors in merged.factors.items():
            assert torch.allclose(factors.delta(), (half if name == module else whole)[name].float(), atol=1e-5)
    with pytest.raises(UserInputError, match="add up to 0"):
        merge(adapters, merge_method="linear", weights=[1.0, -1.0, 0.0])


def test_the_module_that_does_not_fit_is_named() -> None:
    weights: list[dict[str, Any]] = [{"weight": 1.0}, {"weight": {"layers.1.q_proj": 1e9}}, {}]
    with pytest.raises(MergeError, match=r"module 'layers.1.q_proj': the merged factors do not fit torch.float16"):
        summed(three(), adapter_parameters=weights, dtype=torch.float16, report="brief")
