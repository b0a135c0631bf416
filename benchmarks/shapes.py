# SPDX-License-Identifier: Apache-2.0
"""The models that the benchmarks are shaped like, and random adapters on all seven projections of one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vllm_merge import Adapter, LoraFactors


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes of a Llama-like model."""

    name: str
    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """(d_out, d_in) of the projections of one layer."""
        kv = self.hidden // self.heads * self.kv_heads
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.mlp, self.hidden),
            "mlp.up_proj": (self.mlp, self.hidden),
            "mlp.down_proj": (self.hidden, self.mlp),
        }

    @property
    def largest_rank(self) -> int:
        """The rank that some module's ΔW can have at most."""
        return max(min(size) for size in self.projections.values())

    def modules(self) -> Iterator[tuple[str, int, int]]:
        """(name, d_out, d_in) of every module."""
        for layer in range(self.layers):
            for name, (rows, columns) in self.projections.items():
                yield f"model.layers.{layer}.{name}", rows, columns


SHAPES = {
    shape.name: shape
    for shape in (
        ModelShape("0.5b", 896, 4864, 24, 14, 2, 151936),  # Qwen2.5-0.5B
        ModelShape("8b", 4096, 14336, 32, 32, 8, 128256),  # Llama-3-8B
        ModelShape("70b", 8192, 28672, 80, 64, 8, 128256),  # Llama-3-70B
        ModelShape("small", 512, 1024, 4, 8, 4, 4096),  # to try things out
    )
}


def shape_of(text: str) -> ModelShape:
    """`8b`, or `8b:16` for the same with 16 layers. Raises ValueError for another name."""
    name, _, layers = text.partition(":")
    if name not in SHAPES:
        raise ValueError(f"unknown shape {name!r} (known: {', '.join(SHAPES)})")
    shape = SHAPES[name]
    return replace(shape, name=text, layers=int(layers)) if layers else shape


def random_factors(
    shape: ModelShape, rank: int, seed: int, device: str, dtype: torch.dtype = torch.bfloat16
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(module, A, B) of a random adapter; the norm of every ΔW is about that of a fine-tuned one."""
    generator = torch.Generator(device).manual_seed(seed)
    for module, rows, columns in shape.modules():
        a = torch.randn(rank, columns, generator=generator, device=device) / columns**0.5
        b = torch.randn(rows, rank, generator=generator, device=device) / rank**0.5 / 100
        yield module, a.to(dtype), b.to(dtype)


def random_adapters(shape: ModelShape, n: int, rank: int, device: str) -> list[Adapter]:
    """`n` of them with scaling 1. Their content hashes are made up, as in a server they are known before."""
    return [
        Adapter(
            f"a{index}",
            {module: LoraFactors(a, b) for module, a, b in random_factors(shape, rank, index, device)},
            content_hash=f"{index:064x}",
        )
        for index in range(n)
    ]
