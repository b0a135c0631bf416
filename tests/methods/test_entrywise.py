# SPDX-License-Identifier: Apache-2.0
"""Rules of single entries against plain dense versions of their definitions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import golden, golden_mergekit
from tests.adapters_in_memory import SHAPES, deltas, distance, random_adapter, three
from tests.test_golden import relative_error
from vllm_merge import Adapter, LoraFactors, merge

TOLERANCE = 3e-6
WEIGHTS = [0.5, 2.0, -0.7]
W = torch.tensor(WEIGHTS, dtype=torch.float64)[:, None]


def run(adapters: Sequence[Adapter], method: str, **more: Any) -> dict[str, Tensor]:
    return deltas(merge(adapters, merge_method=method, space="delta", rank="lossless", **more))


def by_module(rule: Callable[[Tensor], Tensor], adapters: Sequence[Adapter] | None = None) -> dict[str, Tensor]:
    """A rule of (n, d) float64 values, module by module."""
    dense = [deltas(adapter) for adapter in adapters or three()]
    return {m: rule(torch.stack([d[m].flatten() for d in dense])).view(shape) for m, shape in SHAPES.items()}


def band(row: Tensor, density: float, gamma: float) -> Tensor:
    """The entries of one task at one module that Breadcrumbs keeps."""
    d = row.numel()
    kept = int(d * density)
    top = 0 if density == 1 else min(int(d * gamma), d - kept)
    order = row.abs().argsort(descending=True)
    mask = torch.zeros(d, dtype=torch.bool)
    mask[order[top : top + kept]] = True
    return row * mask


DENSITIES, GAMMAS = [0.3, 0.8, 1.0], [0.05, 0.3, 0.2]


@pytest.mark.parametrize("rescale", [False, True])
def test_breadcrumbs(rescale: bool) -> None:
    def rule(values: Tensor) -> Tensor:
        kept = torch.stack([band(*row) for row in zip(values, DENSITIES, GAMMAS, strict=True)])
        if rescale:
            kept = kept * values.abs().sum(1, keepdim=True) / kept.abs().sum(1, keepdim=True)
        return (W * kept).sum(0)

    each = [{"density": p, "gamma": g} for p, g in zip(DENSITIES, GAMMAS, strict=True)]
    arguments: dict[str, Any] = {"weights": WEIGHTS, "adapter_parameters": each, "parameters": {"rescale": rescale}}
    assert distance(run(three(), "breadcrumbs", **arguments), by_module(rule)) < TOLERANCE


@pytest.mark.parametrize("normalize", [False, True])
def test_breadcrumbs_ties(normalize: bool) -> None:
    def rule(values: Tensor) -> Tensor:
        kept = W * torch.stack([band(row, 0.6, 0.1) for row in values])
        agree = kept * kept.sum(0).sign() > 0
        total = (kept * agree).sum(0)
        return total / (agree * W.abs()).sum(0).clamp_min(1e-30) if normalize else total

    parameters = {"density": 0.6, "gamma": 0.1, "normalize": normalize}
    assert (
        distance(run(three(), "breadcrumbs_ties", weights=WEIGHTS, parameters=parameters), by_module(rule)) < TOLERANCE
    )


def test_a_gamma_under_one_entry_drops_nothing_from_the_top() -> None:
    """mergekit's slice then is empty and its result zero; here it is magnitude pruning."""
    arguments: dict[str, Any] = {"weights": WEIGHTS, "parameters": {"density": 0.5, "gamma": 1e-6}}
    merged = run(three(), "breadcrumbs", **arguments)
    assert distance(merged, run(three(), "magnitude_prune", weights=WEIGHTS, parameters={"density": 0.5})) == 0


def test_outliers_are_what_breadcrumbs_drops() -> None:
    ones, spike = torch.ones(1, 4), torch.tensor([[100.0], [1.0], [1.0], [1.0]])
    x = Adapter("x", {"a": LoraFactors(ones, spike)})
    merged = merge([x], merge_method="breadcrumbs", space="delta", parameters={"density": 0.5, "gamma": 0.25})
    assert torch.allclose(merged.delta("a"), (spike == 1) * torch.ones(4, 4), atol=1e-6)


@pytest.mark.parametrize("trim", ["module", "global"])
def test_magnitude_prune(trim: str) -> None:
    def rule(values: Tensor) -> Tensor:
        return (W * torch.stack([band(row, p, 0) for row, p in zip(values, DENSITIES, strict=True)])).sum(0)

    each = [{"density": p} for p in DENSITIES]
    merged = run(three(), "magnitude_prune", weights=WEIGHTS, adapter_parameters=each, parameters={"trim": trim})
    if trim == "module":
        assert distance(merged, by_module(rule)) < TOLERANCE
        return
    dense = [deltas(adapter) for adapter in three()]
    whole = rule(torch.stack([torch.cat([d[m].flatten() for m in SHAPES]) for d in dense]))
    pieces = whole.split([math.prod(shape) for shape in SHAPES.values()])
    assert distance(merged, {m: p.view(SHAPES[m]) for m, p in zip(SHAPES, pieces, strict=True)}) < TOLERANCE


def sce(values: Tensor, density: float, weights: Tensor) -> Tensor:
    variance = values.var(0, correction=0)
    kept = torch.zeros_like(variance, dtype=torch.bool)
    kept[variance.argsort(descending=True)[: int((variance > 0).sum() * density)]] = True
    values = values * kept
    share = weights * values.square().sum(1, keepdim=True)
    share = share / share.sum() * (values * torch.where(values.sum(0) >= 0, 1.0, -1.0) > 0)
    return (share * values).sum(0) / share.sum(0).clamp_min(1e-30)


@pytest.mark.parametrize("density", [1.0, 0.4])
def test_sce(density: float) -> None:
    weights = [1.0, 0.0, 2.5]
    expected = by_module(lambda v: sce(v, density, torch.tensor(weights)[:, None]))
    assert distance(run(three(), "sce", weights=weights, parameters={"density": density}), expected) < TOLERANCE


def test_sce_has_no_threshold_of_its_own() -> None:
    """Small adapters are weighted by energy as well; mergekit, and compat, let them count alike."""
    (entry,) = (e for e in golden.entries() if e["file"] == "mergekit_sce__tiny3.safetensors")
    recipe = golden_mergekit.recipe_for(entry)
    assert recipe is not None
    adapters, quirk = golden.load_case(entry)
    assert relative_error(merge(adapters, rank="lossless", **recipe), quirk) <= entry["tolerance"]
    recipe["parameters"]["compat"] = "none"
    own = merge(adapters, rank="lossless", **recipe)
    assert relative_error(own, quirk) > 0.01
    scale = 2.0**12
    larger = [
        Adapter(a.name, {m: LoraFactors(f.A, f.B * scale, f.scaling) for m, f in a.factors.items()}) for a in adapters
    ]
    rescaled = {m: f.delta() / scale for m, f in merge(larger, rank="lossless", **recipe).factors.items()}
    assert relative_error(own, rescaled) < 1e-6


@pytest.mark.parametrize("threshold", ["rms", "absolute"])
@pytest.mark.parametrize("plus", [False, True])
def test_ram(threshold: str, plus: bool) -> None:
    epsilon = 0.8 if threshold == "rms" else 0.02

    def rule(values: Tensor) -> Tensor:
        unit = values.square().mean(1, keepdim=True).sqrt() if threshold == "rms" else 1.0
        there = values.abs() > epsilon * unit
        count = there.sum(0)
        strength = torch.ones(len(values), 1, dtype=torch.float64)
        if plus:
            own, shared = (there & (count == 1)).sum(1), (there & (count > 1)).sum(1)
            strength = 1 + 0.3 * (shared / own.clamp_min(1))[:, None].clamp(0, 0.7)
        parts = values * there * torch.where(count == 1, strength, 1.0) / count.clamp_min(1)
        return (W * parts).sum(0)

    parameters: dict[str, Any] = {"epsilon": epsilon, "threshold": threshold}
    parameters |= {"boost": 0.3, "most": 0.7} if plus else {}
    merged = run(three(), "ram_plus" if plus else "ram", weights=WEIGHTS, parameters=parameters)
    assert distance(merged, by_module(rule)) < TOLERANCE


def pcb(values: Tensor, density: float, weights: Tensor) -> Tensor:
    """The authors' description, on one flat vector per task."""
    n, d = values.shape

    def between(x: Tensor, low: int, high: int) -> Tensor:
        ordered = x.sort(1).values
        return x.clamp(ordered[:, low, None], ordered[:, high, None])

    def unit(x: Tensor) -> Tensor:
        low, high = x.min(1, keepdim=True).values, x.max(1, keepdim=True).values
        return (x - low) / (high - low)

    magnitude = between(values.abs(), int(d * 1e-4), int(d * (1 - 1e-4) - 1))
    balance = (n * unit(magnitude) ** 2).exp() * (values * values.sum(0)).tanh()
    share = unit(between(balance, int(d * (1 - density)), d - 1))
    return (weights * values.sign() * magnitude * share).sum(0) / share.sum(0).clamp_min(1e-12)


def opposed() -> list[Adapter]:
    """Two that pull one way and one that pulls the other nearly everywhere: its best entries have negative balance."""
    x = three()[0]
    x = Adapter("x", {m: LoraFactors(f.A, f.B * 6, f.scaling) for m, f in x.factors.items()})
    against = {m: LoraFactors(f.A, f.B * -0.1, f.scaling) for m, f in x.factors.items()}
    return [x, Adapter("against", against), random_adapter("noise", 2, 7, size=0.01)]


@pytest.mark.parametrize("density", [0.05, 0.5])
@pytest.mark.parametrize("adapters", [three, opposed])
def test_pcb(adapters: Callable[[], list[Adapter]], density: float) -> None:
    dense = [deltas(adapter) for adapter in adapters()]
    flat = torch.stack([torch.cat([d[m].flatten() for m in SHAPES]) for d in dense])
    pieces = pcb(flat, density, W).split([math.prod(shape) for shape in SHAPES.values()])
    expected = {m: p.view(SHAPES[m]) for m, p in zip(SHAPES, pieces, strict=True)}
    merged = run(adapters(), "pcb", weights=WEIGHTS, parameters={"density": density})
    assert distance(merged, expected) < 2e-5


def test_emr_unified() -> None:
    def rule(values: Tensor) -> Tensor:
        weighted = W * values
        sign = torch.where(weighted.sum(0) > 0, 1.0, -1.0)
        return sign * (weighted * sign).clamp_min(0).max(0).values

    assert distance(run(three(), "emr_unified", weights=WEIGHTS), by_module(rule)) < TOLERANCE


@pytest.mark.parametrize(("strictness", "agreement"), [(0.4, 2), (1.0, 1), (0.2, 3)])
def test_consensus(strictness: float, agreement: int) -> None:
    def rule(values: Tensor) -> Tensor:
        total = (W * values).sum(0)
        wanted = values.abs() > strictness * (total - values).abs()
        return total * (wanted.sum(0) >= agreement)

    parameters = {"strictness": strictness, "agreement": agreement}
    merged = run(three(), "consensus", weights=WEIGHTS, parameters=parameters)
    assert distance(merged, by_module(rule)) < TOLERANCE


def test_consensus_of_fewer_tasks_than_it_asks_for() -> None:
    """Two tasks and an agreement of five: both have to want an entry. With one task it wants all of its own."""
    x, y, _ = three()
    asked = {"parameters": {"agreement": 5}}
    assert distance(run([x, y], "consensus", **asked), run([x, y], "consensus", parameters={"agreement": 2})) == 0
    assert distance(run([x], "consensus", **asked), x) < TOLERANCE


def test_nearswap_is_that_of_whole_models() -> None:
    """t / |difference| of the way, on W₀ + ΔW as mergekit has it, less W₀."""
    x, y, _ = three()
    t = 0.03
    expected = {}
    for module, shape in SHAPES.items():
        base = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        one, two = base + deltas(x)[module], base + deltas(y)[module]
        share = (t / (one - two).abs()).clamp(0, 1)
        expected[module] = share * two + (1 - share) * one - base
    merged = run([x, y], "nearswap", parameters={"t": t})
    assert distance(merged, expected) < TOLERANCE
    assert distance(merged, x) > 0.1
    assert distance(run([x, y], "nearswap", parameters={"t": 1e3}), y) < TOLERANCE
