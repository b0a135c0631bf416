# SPDX-License-Identifier: Apache-2.0
"""Seeded random masks that do not depend on how the work is cut up, nor on the device.

Whether an entry is kept is a hash of (key, row, column), the key being one of (seed, adapter, module): the generator is
a counter, not a stream. The hash is the finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014), taken once over
the row and once over the column, in 64-bit integer operations that are exact everywhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_merge.adapters.factors import Adapter, LoraFactors, factors_sha256

_BITS = 53  # of the hash that are compared with the density


def _signed(constant: int) -> int:
    """The int64 with the bits of a uint64."""
    return constant - (1 << 64) if constant >> 63 else constant


_STEP = _signed(0x9E3779B97F4A7C15)
_MULTIPLIERS = (_signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB))


def mask_identity(adapter: Adapter) -> str:
    """What stands for an adapter in the keys: the content hash it was given, else a hash of its folded factors.

    The latter is the same whether alpha / r is a scaling or multiplied into B, and in whatever dtype the same numbers are.
    """
    if adapter.known_hash is not None:
        return adapter.known_hash
    return factors_sha256(
        {module: LoraFactors(f.A.float(), f.B.float() * f.scaling) for module, f in adapter.factors.items()}
    )


def mask_keys(seed: int, identities: Sequence[str], modules: Sequence[str]) -> Tensor:
    """Keys (modules, n) int64 on the CPU: the first 64 bits of SHA-256 over seed, adapter and module."""

    def key(identity: str, module: str) -> int:
        digest = hashlib.sha256(f"{seed}\0{identity}\0{module}".encode()).digest()
        return int.from_bytes(digest[:8], "little", signed=True)

    return torch.tensor([[key(identity, module) for identity in identities] for module in modules], dtype=torch.int64)


def keep_mask(keys: Tensor, density: Tensor, rows: slice, cols: slice) -> Tensor:
    """Which entries are kept, each with probability `density`: (modules, n, rows, cols) bool.

    keys: (modules, n) int64. density: (modules, n, 1, 1). rows, cols: where in the module the entries are.
    """
    row = torch.arange(rows.start, rows.stop, device=keys.device).mul_(_STEP)
    col = torch.arange(cols.start, cols.stop, device=keys.device).mul_(_STEP)
    state = _mixed(keys[:, :, None, None] + row[:, None])
    bits = _mixed(state + col) >> (64 - _BITS)  # uniform in −2⁵² … 2⁵² − 1
    return bits < mask_limits(density)


def mask_limits(density: Tensor) -> Tensor:
    """The number, int64, below which a hash of a mask of this density is."""
    return (density.double() * (1 << _BITS)).long() - (1 << (_BITS - 1))


def _mixed(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64, in place; shifts are logical, products are modulo 2⁶⁴."""
    for shift, multiplier in zip((30, 27), _MULTIPLIERS, strict=True):
        x.bitwise_xor_((x >> shift).bitwise_and_((1 << (64 - shift)) - 1)).mul_(multiplier)
    return x.bitwise_xor_((x >> 31).bitwise_and_((1 << 33) - 1))
