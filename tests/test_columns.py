# SPDX-License-Identifier: Apache-2.0
"""Merges that scale columns, put side by side: what a decomposition of the result gives, without one, and where it is not done."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.adapters_in_memory import SHAPES, deltas, distance, random_adapter, three
from vllm_merge import Adapter, LoraFactors, MergeCancelled, MergedAdapter, MergeError, merge
from vllm_merge.adapters.arrangement import FactorViews

ALONE = {"orthogonalize": "none"}
MODULE = "layers.0.q_proj"


def run(adapters: list[Adapter], parameters: dict[str, Any] = ALONE, **more: Any) -> MergedAdapter:
    return merge(adapters, merge_method="do_merging", parameters=parameters, **{"report": "brief", **more})


def side_by_side(merged: MergedAdapter) -> bool:
    return isinstance(merged.factors, FactorViews)


def with_module(adapter: Adapter, factors: LoraFactors) -> Adapter:
    return Adapter(adapter.name, {**adapter.factors, MODULE: factors})


@pytest.mark.parametrize("space", ["knots", "delta"])
@pytest.mark.parametrize(
    "parameters",
    [ALONE, {**ALONE, "magnitude_rule": "sum"}, {**ALONE, "direction_rule": "sum", "lambda": -0.3}, {"steps": 5}],
)
def test_as_a_decomposition_has_it(space: str, parameters: dict[str, Any]) -> None:
    """With weights of both signs; B has orthogonal columns within an adapter, and both factors' columns are alike in length."""
    weights = [0.5, -2.0, 1.0]
    merged = run(three(), parameters, space=space, weights=weights)
    assert side_by_side(merged)
    assert distance(merged, run(three(), parameters, space=space, weights=weights, rank="lossless")) < 1e-6
    assert set(merged.report.ranks.values()) == {10}
    assert set(merged.report.energy_kept.values()) == {None}
    rank = three()[0].rank
    for factors in merged.factors.values():
        own = factors.B[:, :rank]
        gram = own.T @ own
        assert torch.allclose(gram, gram.diagonal().mean() * torch.eye(rank), atol=1e-5 * float(gram.max()))
        assert float(factors.A.norm()) == pytest.approx(float(factors.B.norm()), rel=1e-4)


@pytest.mark.parametrize(
    ("rank", "max_rank", "parameters", "beside"),
    [
        ("auto", None, {}, True),
        ("auto", 10, {}, True),
        ("auto", 9, {}, False),
        (10, None, {}, True),
        (9, None, {}, False),
        ("lossless", None, {}, False),
        ({"energy": 1.0}, None, {}, False),
        ("auto", None, {"direction_rule": "ties"}, False),
        ("auto", None, {"magnitude_rule": "ties"}, False),
    ],
)
def test_only_where_nothing_may_be_cut(rank: Any, max_rank: Any, parameters: dict[str, Any], beside: bool) -> None:
    assert side_by_side(run(three(), {**ALONE, **parameters}, rank=rank, max_rank=max_rank)) == beside


def test_a_module_that_an_adapter_lacks() -> None:
    x, y = three()[:2]
    part = [x, Adapter("y", {m: f for m, f in y.factors.items() if m != MODULE})]
    merged = run(part)
    assert side_by_side(merged)
    assert merged.report.ranks[MODULE] == x.rank
    assert torch.allclose(merged.delta(MODULE), x.factors[MODULE].delta() / 4, atol=1e-6)


def test_the_bytes_do_not_depend_on_the_report() -> None:
    full, brief = run(three(), report="full"), run(three())
    assert full.tensors_sha256 == brief.tensors_sha256
    assert full.report.ranks == brief.report.ranks
    assert set(full.report.effective_rank) == set(SHAPES)


def test_terms_that_nearly_cancel_do_not_suffer_from_a_short_dtype() -> None:
    """B₁ ≈ B₀ and A₁ ≈ −A₀ in a few columns, whose result is a thousandth of their terms."""
    generator = torch.Generator().manual_seed(0)
    d_out, d_in = SHAPES[MODULE]
    a, b = torch.randn(2, d_in, generator=generator), torch.randn(d_out, 2, generator=generator)
    a[1, :8] = -a[0, :8] * (1 + 1e-3)
    b[:, 1] = b[:, 0] + 1e-3 * b[:, 1]
    x, y = Adapter("x", {MODULE: LoraFactors(a, b)}), random_adapter("y", 3, 2)
    y = Adapter("y", {MODULE: y.factors[MODULE]})
    merged = run([x, y], dtype=torch.bfloat16)
    assert side_by_side(merged)
    both = [deltas(one)[MODULE] for one in (x, y)]
    alpha = [one.norm(dim=0) for one in both]
    expected = (alpha[0] + alpha[1]) / 4 * (both[0] / alpha[0] + both[1] / alpha[1])
    error = (merged.delta(MODULE) - expected).norm(dim=0) / expected.norm(dim=0)
    assert float(error.max()) < 2e-2


def test_an_adapter_that_lacks_rank_goes_the_long_way() -> None:
    """All batches that its module is in; the result is as it was."""
    x, y, z = three()
    factors = x.factors[MODULE]
    b = factors.B.clone()
    b[:, 1] = b[:, 0]
    adapters = [with_module(x, LoraFactors(factors.A, b, factors.scaling)), y, z]
    merged = run(adapters)
    assert not side_by_side(merged)
    assert merged.report.ranks[MODULE] == 9
    assert set(merged.factors) == set(SHAPES)
    assert distance(merged, run(adapters, rank="lossless")) < 1e-6


def test_a_module_that_is_zero_is_dropped() -> None:
    x = three()[0]
    factors = x.factors[MODULE]
    empty = LoraFactors(torch.zeros_like(factors.A), factors.B)
    merged = run([with_module(x, empty), Adapter("y", {m: f for m, f in x.factors.items() if m != MODULE})])
    assert merged.report.dropped_modules == [MODULE]
    assert set(merged.factors) == set(SHAPES) - {MODULE}


@pytest.mark.parametrize("side", ["A", "B"])
def test_broken_factors_are_told(side: str) -> None:
    x, y, z = three()
    factors = x.factors[MODULE]
    parts = {"A": factors.A.clone(), "B": factors.B.clone()}
    parts[side][0, 0] = torch.nan
    with pytest.raises(
        MergeError, match=f"adapter 'x', module '{MODULE}': its factors hold values that are not finite"
    ):
        run([with_module(x, LoraFactors(parts["A"], parts["B"])), y, z])


def test_a_dtype_that_is_too_short_is_told() -> None:
    large = [Adapter(a.name, {m: LoraFactors(f.A * 1e6, f.B * 1e6) for m, f in a.factors.items()}) for a in three()]
    with pytest.raises(MergeError, match=r"do not fit torch\.float16"):
        run(large, dtype=torch.float16)


def test_it_stops_when_it_is_told_to() -> None:
    with pytest.raises(MergeCancelled):
        run(three(), cancelled=lambda: True)
