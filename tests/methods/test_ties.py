# SPDX-License-Identifier: Apache-2.0
"""TIES entry by entry, against a plain dense version of the definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.adapters_in_memory import SHAPES, deltas, distance, random_adapter, three
from vllm_merge import Adapter, LoraFactors, merge


def reference(values: Tensor, weights: list[float], densities: list[float], normalize: bool) -> Tensor:
    """values: (n, d) float64; the definition, one flat vector per task."""
    kept = []
    for row, density in zip(values, densities, strict=True):
        threshold = row.abs().sort(descending=True).values[min(int(row.numel() * density), row.numel() - 1)]
        kept.append(torch.where(row.abs() >= threshold, row, 0.0))
    weighted = torch.stack(kept) * torch.tensor(weights)[:, None]
    sign = weighted.sum(0).sign()
    agree = (weighted.sign() == sign) & (weighted != 0)
    total = (weighted * agree).sum(0)
    if not normalize:
        return total
    return total / (agree * torch.tensor(weights).abs()[:, None]).sum(0).clamp_min(1e-30)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("trim", ["global", "module"])
def test_weights_densities_and_trim(normalize: bool, trim: str) -> None:
    weights, densities = [0.5, 2.0, -0.7], [0.2, 0.6, 1.0]
    merged = merge(
        three(),
        merge_method="ties",
        space="delta",
        weights=weights,
        adapter_parameters=[{"density": density} for density in densities],
        parameters={"normalize": normalize, "trim": trim, "lambda": 0.5},
        rank="lossless",
    )
    dense = [deltas(adapter) for adapter in three()]
    flat = {module: torch.stack([d[module].flatten() for d in dense]) for module in SHAPES}
    if trim == "module":
        expected = {m: reference(flat[m], weights, densities, normalize).view(SHAPES[m]) for m in SHAPES}
    else:
        whole = reference(torch.cat(list(flat.values()), 1), weights, densities, normalize)
        pieces = whole.split([v.shape[1] for v in flat.values()])
        expected = {m: piece.view(SHAPES[m]) for m, piece in zip(flat, pieces, strict=True)}
    assert distance(merged, {m: 0.5 * value for m, value in expected.items()}) < 3e-6


def test_a_density_by_module_trims_by_module() -> None:
    by_module = dict.fromkeys(SHAPES, 0.3)
    by_module["layers.0.q_proj"] = 0.9
    arguments = {"merge_method": "ties", "space": "delta", "rank": "lossless"}
    mapped = merge(three(), parameters={"density": by_module}, **arguments)
    per_module = merge(three(), parameters={"density": 0.3, "trim": "module"}, **arguments)
    per_model = merge(three(), parameters={"density": 0.3}, **arguments)
    same = "layers.1.up_proj"
    assert torch.allclose(mapped.delta(same), per_module.delta(same), atol=1e-6)
    assert not torch.allclose(mapped.delta(same), per_model.delta(same), atol=1e-3)
    assert not torch.allclose(mapped.delta("layers.0.q_proj"), per_module.delta("layers.0.q_proj"), atol=1e-3)


def test_exact_ties_take_the_majority_sign_of_the_model() -> None:
    """Two adapters that cancel at one module: the elected sign there is that of most other sums."""
    ones = torch.ones(1, 4)
    for sign in (1.0, -1.0):
        x = Adapter("x", {"a": LoraFactors(ones, torch.ones(4, 1)), "b": LoraFactors(ones, sign * torch.ones(4, 1))})
        y = Adapter("y", {"a": LoraFactors(ones, -torch.ones(4, 1)), "b": LoraFactors(ones, sign * torch.ones(4, 1))})
        merged = merge([x, y], merge_method="ties", space="delta", parameters={"density": 1.0})
        assert torch.allclose(merged.delta("a"), torch.full((4, 4), sign))


def test_sign_conflict_is_reported() -> None:
    x = random_adapter("x", 2, 1)
    opposite = Adapter("opposite", {m: LoraFactors(f.A, -f.B) for m, f in x.factors.items()})
    arguments = {"merge_method": "ties", "space": "delta", "parameters": {"density": 1.0}, "weights": [1.0, 0.5]}
    assert set(merge([x, opposite], **arguments).report.sign_conflict.values()) == {1.0}
    assert set(merge([x, x], **arguments).report.sign_conflict.values()) == {0.0}
