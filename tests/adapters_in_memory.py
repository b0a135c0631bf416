# SPDX-License-Identifier: Apache-2.0
"""Small random adapters for tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from vllm_merge import Adapter, LoraFactors, MergedAdapter

SHAPES = {
    "layers.0.q_proj": (24, 32),
    "layers.0.up_proj": (40, 24),
    "layers.1.q_proj": (24, 32),
    "layers.1.up_proj": (40, 24),
}


def random_adapter(name: str, rank: int, seed: int, *, scaling: float = 1.0, size: float = 1.0) -> Adapter:
    """An adapter with all of SHAPES, its ΔW of Frobenius norm near `size` at every module."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for module, (d_out, d_in) in SHAPES.items():
        a = torch.randn(rank, d_in, generator=generator) / d_in**0.5
        b = torch.randn(d_out, rank, generator=generator) / (d_out * rank) ** 0.5
        factors[module] = LoraFactors(a, b * size / scaling, scaling)
    return Adapter(name, factors)


def three() -> list[Adapter]:
    """Ranks 3, 5 and 2, with scalings."""
    return [
        random_adapter("x", 3, 1, scaling=2.0),
        random_adapter("y", 5, 2),
        random_adapter("z", 2, 3, scaling=0.5, size=3.0),
    ]


def map_factors(adapter: Adapter, change: Callable[[LoraFactors], LoraFactors]) -> Adapter:
    """The adapter with every module changed."""
    return Adapter(adapter.name, {module: change(factors) for module, factors in adapter.factors.items()})


def zero_adapter() -> Adapter:
    """An adapter as it is before training: B is zero."""
    return map_factors(random_adapter("zero", 4, 9), lambda f: LoraFactors(f.A, torch.zeros_like(f.B), 1.0))


def deltas(source: MergedAdapter | Adapter | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """ΔW of all of SHAPES, float64, zeros where a module is missing."""
    found: Mapping[str, Tensor] = (
        source if isinstance(source, Mapping) else {m: f.delta() for m, f in source.factors.items()}
    )
    return {module: found.get(module, torch.zeros(shape)).double() for module, shape in SHAPES.items()}


def distance(
    one: MergedAdapter | Adapter | Mapping[str, Tensor], two: MergedAdapter | Adapter | Mapping[str, Tensor]
) -> float:
    """‖one − two‖_F / ‖two‖_F over all modules."""
    a, b = deltas(one), deltas(two)
    difference = sum(float((a[m] - b[m]).square().sum()) for m in SHAPES)
    return float((difference / sum(float(b[m].square().sum()) for m in SHAPES)) ** 0.5)


def weighted_sum(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, Tensor]:
    """Σ w_i ΔW_i, dense, float64."""
    dense = [deltas(adapter) for adapter in adapters]
    return {m: sum((w * d[m] for w, d in zip(weights, dense, strict=True)), torch.zeros(())) for m in SHAPES}
