# SPDX-License-Identifier: Apache-2.0
"""The masks of `algebra.masks`, drawn where the entries are made: the same bits, by the same integer operations."""

from __future__ import annotations

import triton
import triton.language as tl

_STEP = tl.constexpr(0x9E3779B97F4A7C15)
_FIRST = tl.constexpr(0xBF58476D1CE4E5B9)
_SECOND = tl.constexpr(0x94D049BB133111EB)
_UNUSED_BITS = tl.constexpr(11)  # of the 64 of a hash


@triton.jit
def _mixed(x):  # type: ignore[no-untyped-def]
    x = (x ^ (x >> 30)) * _FIRST
    x = (x ^ (x >> 27)) * _SECOND
    return x ^ (x >> 31)


@triton.jit
def keep(key, limit, row, column):  # type: ignore[no-untyped-def]
    """`keep_mask` at rows and columns of a module, counted from its first ones, (rows, columns). limit: see `mask_limits`."""
    state = _mixed(key.to(tl.uint64, bitcast=True) + row.to(tl.uint64) * _STEP)
    bits = _mixed(state[:, None] + (column.to(tl.uint64) * _STEP)[None, :])
    return (bits.to(tl.int64, bitcast=True) >> _UNUSED_BITS) < limit
