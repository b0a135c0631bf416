# SPDX-License-Identifier: Apache-2.0
"""WUDI, SVC and DC-Merge against their definitions on dense matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.adapters_in_memory import SHAPES, deltas, distance, random_adapter, three, weighted_sum
from vllm_merge import Adapter, LoraFactors, merge

WEIGHTS = [0.5, -1.0, 2.0]


def tasks() -> dict[str, list[Tensor]]:
    """w_i ΔW_i of three(), dense, by module."""
    dense = [deltas(adapter) for adapter in three()]
    return {m: [w * d[m] for w, d in zip(WEIGHTS, dense, strict=True)] for m in SHAPES}


def interference(change: Tensor, parts: list[Tensor]) -> Tensor:
    """What WUDI minimises."""
    return torch.stack([((change - x) @ x.T).square().sum() / x.square().sum() for x in parts]).sum()


def test_wudi_is_the_minimum() -> None:
    merged = merge(three(), merge_method="wudi", weights=WEIGHTS)
    for module, parts in tasks().items():
        change = merged.delta(module).double().requires_grad_()
        loss = interference(change, parts)
        (gradient,) = torch.autograd.grad(loss, change)
        start = sum(parts, torch.zeros_like(parts[0])).requires_grad_()
        (before,) = torch.autograd.grad(interference(start, parts), start)
        assert float(gradient.norm()) < 1e-5 * float(before.norm())


def test_wudi_steps_are_those_of_gradient_descent() -> None:
    found = merge(three(), merge_method="wudi", weights=WEIGHTS, parameters={"steps": 5})
    expected = {}
    for module, parts in tasks().items():
        s = torch.stack([x.T @ x / x.square().sum() for x in parts]).sum(0)
        step = 1 / (2 * torch.linalg.matrix_norm(s, 2))
        change = sum(parts, torch.zeros_like(parts[0]))
        for _ in range(5):
            change = change.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(interference(change, parts), change)
            change = change - step * gradient
        expected[module] = change.detach()
    assert distance(found, expected) < 3e-6


def test_wudi_begins_at_the_sum_and_ends_at_the_minimum() -> None:
    start, end = (
        merge(three(), merge_method="wudi", weights=WEIGHTS, parameters={"steps": steps}) for steps in (0, 10**9)
    )
    assert distance(start, weighted_sum(three(), WEIGHTS)) < 3e-6
    assert distance(end, merge(three(), merge_method="wudi", weights=WEIGHTS)) < 3e-6


@pytest.mark.parametrize("base", ["mean", "sum"])
def test_svc_by_its_formula(base: str) -> None:
    alpha = 0.2
    merged = merge(three(), merge_method="svc", weights=WEIGHTS, parameters={"base": base, "alpha": alpha})
    expected = {}
    for module, parts in tasks().items():
        whole = sum(parts, torch.zeros_like(parts[0])) / (3 if base == "mean" else 1)
        u, s, v = torch.linalg.svd(whole, full_matrices=False)
        rank = int((s > 1e-5 * s[0]).sum())
        u, s, v = u[:, :rank], s[:rank], v[:rank]
        coefficients = []
        for part in parts:
            response = u.T @ part
            coefficients.append(((u.T @ whole) * response).sum(1) / response.square().sum(1))
        gamma = 3 / torch.stack(coefficients).clamp_min(alpha).sum(0)
        expected[module] = u * (gamma * s) @ v
    assert distance(merged, expected) < 1e-5


def orthogonal() -> list[Adapter]:
    """Two adapters whose changes have no direction in common, on either side."""
    found = []
    bases = {
        m: (torch.linalg.qr(torch.randn(o, 6)).Q, torch.linalg.qr(torch.randn(i, 6)).Q) for m, (o, i) in SHAPES.items()
    }
    for index, part in enumerate((slice(0, 3), slice(3, 6))):
        size = torch.tensor([3.0, 2.0, 1.0]) * (index + 1)
        found.append(
            Adapter(str(index), {m: LoraFactors(v[:, part].T, u[:, part] * size) for m, (u, v) in bases.items()})
        )
    return found


def test_dc_merge_of_orthogonal_tasks_is_their_sum() -> None:
    """With nothing smoothed or cut off there is nothing to elect or to clear."""
    torch.manual_seed(0)
    adapters = orthogonal()
    merged = merge(adapters, merge_method="dc_merge", parameters={"smoothing": "none", "keep": 1.0})
    assert distance(merged, weighted_sum(adapters, [1.0, 1.0])) < 3e-6


@pytest.mark.parametrize(
    ("smoothing", "rho", "expected"),
    [("avg", 5.0, [2.0, 2.0, 2.0]), ("linear", 5.0, [3.0, 2.0, 1.0]), ("linear", 2.0, [8 / 3, 2.0, 4 / 3])],
)
def test_dc_merge_smooths_a_spectrum_of_3_2_1(smoothing: str, rho: float, expected: list[float]) -> None:
    torch.manual_seed(0)
    merged = merge(
        orthogonal()[:1], merge_method="dc_merge", parameters={"smoothing": smoothing, "rho": rho, "keep": 1.0}
    )
    for module in SHAPES:
        singular = torch.linalg.svdvals(merged.delta(module))[:3]
        assert torch.allclose(singular, torch.tensor(expected), atol=1e-5)


def test_dc_merge_keeps_so_many_entries() -> None:
    """Of a lone adapter all of whose entries lie on the diagonal, the rank is how many are kept."""
    x = random_adapter("x", 10, 1)
    for keep, rank in ((0.001, 1), (0.03, 3), (1.0, 10)):
        assert merge([x], merge_method="dc_merge", parameters={"smoothing": "none", "keep": keep}).rank == rank
