# SPDX-License-Identifier: Apache-2.0
"""Whatever is registered, in each of its spaces, on inputs that are hard: finite, of a rank that a LoRA can have, steady.

What a single method does beyond that stands in its own tests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch

from tests.adapters_in_memory import deltas, distance, three, zero_adapter
from tests.methods.cases import HARD, duplicates, identified, noisy, shared_a
from vllm_merge import Adapter, LoraFactors, MergedAdapter, list_methods, merge
from vllm_merge.methods.registry import default_registry

EVERYWHERE = pytest.mark.parametrize(
    ("method", "space"),
    [pytest.param(spec.name, space, id=f"{spec.name}-{space}") for spec in list_methods() for space in spec.spaces],
)

LONG = pytest.mark.parametrize(
    ("method", "space"),
    [
        pytest.param(
            spec.name, space, id=f"{spec.name}-{space}", marks=[pytest.mark.full] * (space != spec.default_space)
        )
        for spec in list_methods()
        for space in spec.spaces
    ],
)


def made(name: str, seed: int, shapes: Mapping[str, tuple[int, int]], rank: int) -> Adapter:
    """An adapter of other modules than the usual ones, ‖ΔW‖ near 1 at each."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for module, (d_out, d_in) in shapes.items():
        a = torch.randn(rank, d_in, generator=generator) / d_in**0.5
        factors[module] = LoraFactors(a, torch.randn(d_out, rank, generator=generator) / (d_out * rank) ** 0.5)
    return Adapter(name, factors)


def ranks_1_to_256() -> list[Adapter]:
    """Ranks far apart, the largest nearly that of the module."""
    shapes = {"layers.0.q_proj": (300, 280)}
    return [made(str(rank), rank, shapes, rank) for rank in (1, 16, 256)]


def language_model_head() -> list[Adapter]:
    """A head with many more outputs than inputs, in two of three adapters."""
    head, usual = {"lm_head": (900, 24)}, {"layers.0.q_proj": (24, 24)}
    return [made("x", 1, {**usual, **head}, 4), made("y", 2, usual, 4), made("z", 3, head, 4)]


def experts() -> list[Adapter]:
    """Experts as modules: many of one shape, not all of them in every adapter."""
    shapes = {f"layers.0.mlp.experts.{i}.{part}": (20, 12) for i in range(6) for part in ("up_proj", "gate_proj")}
    some = dict(list(shapes.items())[:5])
    return [made("x", 1, shapes, 2), made("y", 2, some, 2), made("z", 3, shapes, 2)]


def with_zero() -> list[Adapter]:
    """One that changes nothing."""
    x, y, _ = three()
    return [x, zero_adapter(), y]


INPUTS: Mapping[str, Callable[[], list[Adapter]]] = {
    **HARD,
    **{builder.__name__: builder for builder in (ranks_1_to_256, language_model_head, experts, with_zero)},
}


def taken(method: str, adapters: Sequence[Adapter]) -> list[Adapter]:
    """As many as the method takes, zero ones aside, and of one rank at each module where factors are added entry by entry."""
    spec = default_registry().get(method)
    found = list(adapters)
    if not spec.exact:
        found = [_at_rank(adapter, 3) for adapter in found]
    real = [adapter for adapter in found if any(f.B.any() for f in adapter.factors.values())]
    return found if spec.most_adapters is None else (real * 2)[: spec.most_adapters]


def _at_rank(adapter: Adapter, rank: int) -> Adapter:
    factors = {m: LoraFactors(f.A[:rank], f.B[:, :rank], f.scaling) for m, f in adapter.factors.items()}
    padded = {
        m: LoraFactors(
            torch.nn.functional.pad(f.A, (0, 0, 0, rank - f.rank)),
            torch.nn.functional.pad(f.B, (0, rank - f.rank)),
            f.scaling,
        )
        for m, f in factors.items()
    }
    return Adapter(adapter.name, padded)


def run(method: str, space: str, adapters: Sequence[Adapter], **more: Any) -> MergedAdapter:
    given = identified(list(adapters))
    return merge(given, merge_method=method, space=space, **{"rank": "lossless", "report": "brief", "seed": 3, **more})


@pytest.mark.parametrize("inputs", INPUTS)
@LONG
def test_a_result_on_hard_inputs(method: str, space: str, inputs: str) -> None:
    adapters = taken(method, INPUTS[inputs]())
    merged = run(method, space, adapters)
    shapes = {module: factors.shape for adapter in adapters for module, factors in adapter.factors.items()}
    assert set(merged.factors) <= set(shapes)
    assert merged.factors
    for module, factors in merged.factors.items():
        assert factors.shape == shapes[module]
        assert factors.rank <= min(shapes[module]) or factors.rank <= sum(
            adapter.factors[module].rank for adapter in adapters if module in adapter.factors
        )
        assert bool(factors.A.isfinite().all())
        assert bool(factors.B.isfinite().all())
    size = sum(float(delta.norm()) ** 2 for delta in map(merged.delta, merged.factors)) ** 0.5
    norms = [sum(float(f.delta().norm()) ** 2 for f in adapter.factors.values()) ** 0.5 for adapter in adapters]
    assert 0 < size < 20 * sum(norms)


@pytest.mark.parametrize("inputs", [duplicates, shared_a])
@EVERYWHERE
def test_noise_of_rounding_moves_nothing(method: str, space: str, inputs: Callable[[], list[Adapter]]) -> None:
    clean = taken(method, inputs())
    other = [noisy(adapter, seed) for seed, adapter in enumerate(clean)]
    assert distance(run(method, space, other), run(method, space, clean)) < 1e-6


@EVERYWHERE
def test_the_same_seed_gives_the_same_bytes(method: str, space: str) -> None:
    adapters = taken(method, three())
    first = run(method, space, adapters, rank=4)
    assert run(method, space, adapters, rank=4).tensors_sha256 == first.tensors_sha256
    full = run(method, space, adapters, rank=4, report="full")
    assert full.tensors_sha256 == first.tensors_sha256


@EVERYWHERE
def test_a_small_workspace_gives_the_same_result(method: str, space: str) -> None:
    adapters = taken(method, three())
    small = run(method, space, adapters, workspace_bytes=1 << 14)
    assert distance(small, run(method, space, adapters)) < 1e-5
    assert deltas(small).keys() == deltas(adapters[0]).keys()
