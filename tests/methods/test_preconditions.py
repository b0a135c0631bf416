# SPDX-License-Identifier: Apache-2.0
"""Preconditions: each against its dense definition, then what holds for all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

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
from tests.methods.cases import HARD, noisy
from vllm_merge import Adapter, LoraFactors, MergedAdapter, UserInputError, merge
from vllm_merge.methods.preconditions import Context, precondition, precondition_names, resolve_preconditions

CONTEXT = Context(torch.device("cpu"), seed=0, workspace_bytes=1 << 30)
ALL: list[str | Mapping[str, object]] = [
    "norm_cap",
    "pico",
    "dare",
    {"do_orthogonalize": {"steps": 20}},
    {"do_orthogonalize": {"optimizer": "adam", "steps": 20}},
]
each = pytest.mark.parametrize("entry", ALL, ids=["norm_cap", "pico", "dare", "descent", "adam"])


def change(adapters: Sequence[Adapter], *entries: str | Mapping[str, object], **context: Any) -> Sequence[Adapter]:
    where = Context(torch.device("cpu"), context.get("seed", 0), context.get("workspace_bytes", 1 << 30))
    for function in resolve_preconditions(entries):
        adapters = function(adapters, where)
    return adapters


def summed(adapters: Sequence[Adapter], *entries: str | Mapping[str, object], **more: Any) -> MergedAdapter:
    return merge(adapters, merge_method="task_arithmetic", precondition=entries, rank="lossless", **more)


def sized(*norms: float) -> list[Adapter]:
    """Adapters of exactly these norms at every module."""
    result = []
    for index, norm in enumerate(norms):
        adapter = random_adapter(str(index), 3, index)
        result.append(map_factors(adapter, lambda f, n=norm: LoraFactors(f.A, f.B, n / float(f.delta().norm()))))  # type: ignore[misc]
    return result


def test_the_names() -> None:
    assert precondition_names() == ["dare", "do_orthogonalize", "norm_cap", "peft_double_scaling", "pico"]
    with pytest.raises(ValueError, match="registered twice"):
        precondition("pico")(lambda adapters, context: [])


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("norm_cop", r"unknown precondition 'norm_cop', did you mean 'norm_cap'\? \(known: dare, do_ortho"),
        ({"norm_cap": {"mad": 2}}, r"precondition 'norm_cap' has no parameter 'mad', did you mean 'mads'\?"),
        ({"pico": {"mads": 2}}, r"'pico' has no parameter 'mads' \(its parameters: none\)"),
        ({"norm_cap": {"mads": -1}}, r"precondition 'norm_cap': parameter 'mads' is -1; allowed is number ≥ 0"),
        ({"dare": {"density": 0}}, "parameter 'density' is 0; allowed is number > 0, ≤ 1"),
        ({"dare": 0.5}, "its parameters must be a mapping; found 0.5"),
        ({"dare": {}, "pico": {}}, "a precondition is a name or"),
    ],
)
def test_wrong_entries(entry: Any, message: str) -> None:
    with pytest.raises(UserInputError, match=message):
        summed(three(), entry)


def test_norm_cap() -> None:
    """Norms 1, 2, 3, 4, 100: median 3, MAD 1, cap 6 at three MADs and 4 at one."""
    adapters = sized(1, 2, 3, 4, 100)
    for mads, expected in ((3.0, [1, 2, 3, 4, 6]), (1.0, [1, 2, 3, 4, 4]), (0.0, [1, 2, 3, 3, 3])):
        for adapter, before, norm in zip(
            change(adapters, {"norm_cap": {"mads": mads}}), adapters, expected, strict=True
        ):
            for module, factors in adapter.factors.items():
                assert float(factors.delta().norm()) == pytest.approx(norm, rel=1e-5)
                own = before.factors[module].delta()
                assert torch.allclose(factors.delta() / norm, own / own.norm(), atol=1e-6)


def test_norm_cap_of_an_even_number_and_of_missing_modules() -> None:
    """Norms 1, 2, 4, 50 where all four have the module: median 3, MAD 1.5. Where two have it nothing is capped."""
    adapters = sized(1, 2, 4, 50)
    module = "layers.0.q_proj"
    adapters[0] = Adapter("0", {m: f for m, f in adapters[0].factors.items() if m != module})
    dead = adapters[1].factors[module]
    zero = LoraFactors(dead.A, torch.zeros_like(dead.B))
    adapters[1] = Adapter("1", {**adapters[1].factors, module: zero})
    capped = change(adapters, "norm_cap")
    other = [float(a.factors["layers.1.q_proj"].delta().norm()) for a in capped]
    assert other == pytest.approx([1, 2, 4, 7.5], rel=1e-5)
    assert float(capped[3].factors[module].delta().norm()) == pytest.approx(50, rel=1e-5)
    assert module not in capped[0].factors


def test_pico() -> None:
    merged = summed(three(), "pico")
    expected = {}
    for module in SHAPES:
        pairs = [(adapter.factors[module].folded(), deltas(adapter)[module]) for adapter in three()]
        u, sigma, _ = torch.linalg.svd(torch.cat([f.B.double() for f, _ in pairs], 1), full_matrices=False)
        alpha = 1 / (1 + 2 * sigma.square() / sigma.square().sum())
        filtered = torch.eye(len(u), dtype=torch.float64) + u @ torch.diag(alpha - 1) @ u.T
        expected[module] = filtered @ torch.stack([delta for _, delta in pairs]).sum(0)
    assert distance(merged, expected) < 1e-6
    assert distance(merged, summed(three())) > 0.1


def test_pico_leaves_an_adapter_alone() -> None:
    x = random_adapter("x", 4, 1)
    assert distance(summed([x], "pico"), x) < 1e-6
    partial = Adapter("y", {m: f for m, f in three()[1].factors.items() if m == "layers.0.q_proj"})
    one = change([x, partial], "pico")[0]
    assert torch.allclose(one.factors["layers.1.q_proj"].delta(), x.factors["layers.1.q_proj"].delta(), atol=1e-6)
    assert not torch.allclose(one.factors["layers.0.q_proj"].delta(), x.factors["layers.0.q_proj"].delta(), atol=1e-3)


def test_dare_keeps_the_rank_and_the_expectation() -> None:
    entry, draws = {"dare": {"density": 0.6}}, 60
    mean = {m: torch.zeros(shape, dtype=torch.float64) for m, shape in SHAPES.items()}
    for seed in range(draws):
        merged = deltas(summed(three(), entry, seed=seed))
        mean = {m: value + merged[m] / draws for m, value in mean.items()}
    assert distance(mean, weighted_sum(three(), [1, 1, 1])) < 1.5 * (0.4 / 0.6 / draws) ** 0.5
    b = change(three(), entry)[1].factors["layers.1.up_proj"].B
    before = three()[1].factors["layers.1.up_proj"].B
    assert float((b != 0).double().mean()) == pytest.approx(0.6, abs=0.1)
    assert torch.allclose(b[b != 0], (before / 0.6)[b != 0])


def test_dare_before_dare_draws_other_masks() -> None:
    first, second = (change(three(), *["dare"] * count) for count in (1, 2))
    for one, two in zip(first, second, strict=True):
        kept = torch.cat([f.B.flatten() for f in one.factors.values()]) != 0
        again = torch.cat([f.B.flatten() for f in two.factors.values()]) != 0
        assert not (again & ~kept).any()
        assert float(again.sum() / kept.sum()) == pytest.approx(0.5, abs=0.15)


def overlap(adapters: Sequence[Adapter]) -> float:
    """Σ_{i≠j} ‖A_i A_jᵀ‖² + ‖B_iᵀ B_j‖² over all modules."""
    total = 0.0
    for module in SHAPES:
        pairs = [adapter.factors[module].folded() for adapter in adapters]
        for i, one in enumerate(pairs):
            for two in pairs[:i] + pairs[i + 1 :]:
                total += float((one.A @ two.A.T).square().sum() + (one.B.T @ two.B).square().sum())
    return total


@pytest.mark.parametrize("optimizer", ["descent", "adam"])
@pytest.mark.parametrize("power", [1, 2])
def test_do_orthogonalize_lowers_the_overlap(optimizer: str, power: int) -> None:
    before, shifts, left = overlap(three()), [], []
    for gamma in (0.0, 0.1, 10.0):
        entry = {"do_orthogonalize": {"optimizer": optimizer, "norm_power": power, "gamma": gamma}}
        turned = change(three(), entry)
        left.append(overlap(turned))
        shifts.append(sum(distance(one, two) for one, two in zip(turned, three(), strict=True)))
    assert left[0] < 0.05 * before
    assert max(left[:2]) < left[2] < before  # the more the factors are held back, the less they turn
    assert min(shifts[:2]) > shifts[2]


def test_descent_is_that_of_the_loss() -> None:
    """One step: down the gradient of Σ ‖A_i A_jᵀ‖², by 1 / (12 λ_max(A Aᵀ)); B likewise."""
    turned = change(three(), {"do_orthogonalize": {"steps": 1, "gamma": 0.0}})
    for module in SHAPES:
        folded = [adapter.factors[module].folded() for adapter in three()]
        for side in (lambda f: f.A.double(), lambda f: f.B.double().mT):
            mats = [side(f).requires_grad_() for f in folded]
            loss = torch.stack(
                [(a @ b.T).square().sum() for i, a in enumerate(mats) for j, b in enumerate(mats) if i != j]
            ).sum()
            slopes = torch.autograd.grad(loss, mats)
            size = 1 / (12 * torch.linalg.matrix_norm(torch.cat(mats), ord=2) ** 2)
            for adapter, mat, slope in zip(turned, mats, slopes, strict=True):
                assert torch.allclose(side(adapter.factors[module]), mat - size * slope, atol=1e-6)


def test_do_orthogonalize_ignores_terms_that_are_no_part_of_the_update() -> None:
    x, y, z = three()
    dead = {m: LoraFactors(f.A, torch.zeros_like(f.B)) for m, f in z.factors.items() if "q_proj" in m}
    with_dead = change([x, y, Adapter("z", dead)], "do_orthogonalize")[:2]
    for one, two in zip(with_dead, change([x, y], "do_orthogonalize"), strict=True):
        assert distance(one, two) < 1e-6


@each
def test_zero_adapters_are_dropped_before(entry: Any) -> None:
    merged = summed([*three()[:2], zero_adapter(), three()[2]], entry)
    assert merged.report.dropped_adapters == ["zero"]
    assert merged.tensors_sha256 == summed(three(), entry).tensors_sha256


@each
def test_order_scaling_and_batches_do_not_matter(entry: Any) -> None:
    x, y, z = three()
    expected = summed([x, y, z], entry)
    assert distance(summed([z, x, y], entry), expected) < 3e-6
    assert distance(summed([map_factors(a, LoraFactors.folded) for a in (x, y, z)], entry), expected) < 3e-6
    assert distance(summed([x, y, z], entry, workspace_bytes=1 << 13), expected) < 3e-6
    assert summed([x, y, z], entry).tensors_sha256 == expected.tensors_sha256


@pytest.mark.parametrize("case", HARD)
@each
def test_hard_adapters(entry: Any, case: str) -> None:
    adapters = [Adapter(a.name, a.factors, content_hash=a.name) for a in HARD[case]()]
    changed = change(adapters, entry)
    for before, after in zip(adapters, changed, strict=True):
        assert after.name == before.name
        assert {m: (f.rank, f.shape) for m, f in after.factors.items()} == {
            m: (f.rank, f.shape) for m, f in before.factors.items()
        }
        assert all(f.A.isfinite().all() and f.B.isfinite().all() for f in after.factors.values())
    other = [noisy(adapter, seed) for seed, adapter in enumerate(adapters)]
    assert distance(summed(other, entry), summed(adapters, entry)) < 1e-6


def test_they_run_in_the_order_of_the_list() -> None:
    adapters = sized(1, 2, 3, 4, 100)
    one, two = summed(adapters, "norm_cap", "pico"), summed(adapters, "pico", "norm_cap")
    expected = change(change(adapters, "norm_cap"), "pico")
    assert distance(one, weighted_sum(expected, [1.0] * 5)) < 1e-6
    assert distance(two, one) > 1e-2
    assert one.provenance["precondition"] == ["norm_cap", "pico"]


def test_peft_double_scaling_is_a_second_scaling() -> None:
    scales = [adapter.factors["layers.0.q_proj"].scaling for adapter in three()]
    merged = merge(three(), merge_method="task_arithmetic", precondition=["peft_double_scaling"])
    assert distance(merged, weighted_sum(three(), scales)) < 3e-6


def test_the_descent_does_not_depend_on_how_many_modules_it_takes_at_once() -> None:
    adapters = three()
    few, many = (
        merge(adapters, merge_method="linear", precondition=["do_orthogonalize"], rank="lossless", workspace_bytes=size)
        for size in (1, 1 << 30)
    )
    assert few.factors.keys() == many.factors.keys()
    for module in many.factors:
        torch.testing.assert_close(few.delta(module), many.delta(module), rtol=0, atol=1e-6)
