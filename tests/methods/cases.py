# SPDX-License-Identifier: Apache-2.0
"""One configuration of every method that works on singular vectors, and inputs that are hard for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.adapters_in_memory import map_factors, random_adapter, three
from vllm_merge import Adapter, LoraFactors

SPECTRAL: dict[str, tuple[str, dict[str, Any]]] = {
    "tsv_m": ("tsv_m", {}),
    "tsv_m-isotropize": ("tsv_m", {"isotropize": True}),
    "iso_c": ("iso_c", {}),
    "iso_cts": ("iso_cts", {}),
    "iso_cts-half": ("iso_cts", {"common_fraction": 0.5}),
    "opcm": ("opcm", {}),
    "opcm-shuffle": ("opcm", {"shuffle": True}),
    "ctm-ties": ("ctm", {"density": 0.5}),
    "ctm-ties-1": ("ctm", {"density": 1.0}),
    "ctm-mean": ("ctm", {"rule": "mean", "target_rank": 4, "beta": 0.0}),
    "ctm-sum": ("ctm", {"rule": "sum", "target_rank": 64, "beta": 1.0}),
    "ctm-dare_ties": ("ctm", {"rule": "dare_ties", "density": 0.5}),
    "dc_merge": ("dc_merge", {"keep": 0.3}),
    "dc_merge-linear": ("dc_merge", {"smoothing": "linear", "keep": 1.0}),
    "wudi": ("wudi", {}),
    "wudi-steps": ("wudi", {"steps": 2}),
    "svc": ("svc", {}),
    "svc-sum": ("svc", {"base": "sum"}),
    "svc-tsv_m": ("svc", {"base": "tsv_m"}),
}


def duplicates() -> list[Adapter]:
    """x, y, and x again under another name."""
    x, y = random_adapter("x", 4, 1), random_adapter("y", 3, 2)
    return [x, y, Adapter("again", x.factors)]


def shared_a() -> list[Adapter]:
    """Two adapters with the same A."""
    x, y = random_adapter("x", 4, 1), random_adapter("y", 4, 2)
    return [x, Adapter("y", {m: LoraFactors(x.factors[m].A, f.B) for m, f in y.factors.items()})]


def more_than_fits() -> list[Adapter]:
    """Ranks that add up to more than min(d) at every module."""
    return [random_adapter(str(seed), 12, seed) for seed in range(4)]


def rank_above_the_module() -> list[Adapter]:
    """A rank larger than min(d)."""
    return [random_adapter("x", 50, 1), random_adapter("y", 3, 2)]


def one() -> list[Adapter]:
    """A single adapter."""
    return [random_adapter("x", 4, 1, scaling=2.0)]


def thirty_two() -> list[Adapter]:
    """Many adapters, of ranks 1 to 4."""
    return [random_adapter(str(seed), 1 + seed % 4, seed) for seed in range(32)]


def norms_apart() -> list[Adapter]:
    """Norms 10, 1e4 and 1."""
    return [random_adapter(str(size), 4, seed, size=size) for seed, size in enumerate((10.0, 1e4, 1.0))]


def alphas() -> list[Adapter]:
    """Scalings from .01 to 1e4 of the same norm."""
    return [random_adapter(str(scaling), 4, seed, scaling=scaling) for seed, scaling in enumerate((0.01, 1.0, 1e4))]


def bfloat16() -> list[Adapter]:
    """Factors in bf16 and fp16."""
    kinds = (torch.bfloat16, torch.float16, torch.bfloat16)
    return [
        map_factors(adapter, lambda f, kind=kind: LoraFactors(f.A.to(kind), f.B.to(kind), f.scaling))  # type: ignore[misc]
        for adapter, kind in zip(three(), kinds, strict=True)
    ]


def own_modules() -> list[Adapter]:
    """Each adapter has modules that others lack."""
    x, y, z = three()
    return [
        Adapter("x", {m: f for m, f in x.factors.items() if m != "layers.0.q_proj"}),
        Adapter("y", {m: f for m, f in y.factors.items() if m == "layers.1.up_proj"}),
        Adapter("z", {m: f for m, f in z.factors.items() if "layers.1" not in m}),
    ]


HARD: dict[str, Callable[[], list[Adapter]]] = {
    builder.__name__: builder
    for builder in (
        duplicates,
        shared_a,
        more_than_fits,
        rank_above_the_module,
        one,
        thirty_two,
        norms_apart,
        alphas,
        bfloat16,
        own_modules,
    )
}


def identified(adapters: list[Adapter]) -> list[Adapter]:
    """The adapters with their names for an identity: random masks then do not depend on how factors are written."""
    return [Adapter(adapter.name, adapter.factors, content_hash=adapter.name) for adapter in adapters]


def changed(adapter: Adapter, change: Callable[[LoraFactors], LoraFactors]) -> Adapter:
    """Every module changed, the identity kept."""
    return Adapter(adapter.name, map_factors(adapter, change).factors, content_hash=adapter.known_hash)


def noisy(adapter: Adapter, seed: int) -> Adapter:
    """The adapter with a relative noise of 1e-12 on its factors, in float64."""

    def change(factors: LoraFactors) -> LoraFactors:
        generator = torch.Generator().manual_seed(seed)
        a, b = (
            t.double() * (1 + 1e-12 * torch.randn(t.shape, generator=generator, dtype=torch.float64))
            for t in (factors.A, factors.B)
        )
        return LoraFactors(a, b, factors.scaling)

    return changed(adapter, change)


def regauged(adapter: Adapter, seed: int) -> Adapter:
    """(B C⁻¹, C A) for a well-conditioned C of another scale."""

    def change(factors: LoraFactors) -> LoraFactors:
        generator = torch.Generator().manual_seed(seed)
        c = 8 * torch.linalg.qr(torch.randn(factors.rank, factors.rank, generator=generator, dtype=torch.float64)).Q
        c = c + torch.eye(factors.rank, dtype=torch.float64)
        b = torch.linalg.solve(c, factors.B.double(), left=False)
        return LoraFactors(c @ factors.A.double(), b, factors.scaling)

    return changed(adapter, change)
