# SPDX-License-Identifier: Apache-2.0
"""Rules that ask how many tasks agree on an entry, over products that are never stored (`products`)."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from vllm_merge.kernels import turns
from vllm_merge.kernels.products import (
    ANYWHERE,
    COUNTS,
    TILE_COLUMNS,
    TILE_ROWS,
    Products,
    Rule,
    product,
    times,
    trimmed,
)


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=ANYWHERE)  # type: ignore[untyped-decorator]
def _by_count(  # type: ignore[no-untyped-def]
    left, right, bounds, factor, least, most, keys, limits, out, n, rows, columns, first_row, first_column,
    lm, lr, lk, rm, rk, rc,
    FREQUENCY: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """TIES whose election no factor takes part in: what agrees is multiplied, added up, and divided by how many it is."""
    module = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    above = tl.zeros((ROWS, COLUMNS), tl.float32)
    below = tl.zeros((ROWS, COLUMNS), tl.float32)
    many_above = tl.zeros((ROWS, COLUMNS), tl.float32)
    many_below = tl.zeros((ROWS, COLUMNS), tl.float32)
    for task in range(n):
        entries = product(
            left, right, bounds, module, task, row, column, rows, columns, lm, lr, lk, rm, rk, rc, DEPTH
        )  # fmt: skip
        place = module * n + task
        kept = trimmed(entries, least, most, keys, limits, place, first_row + row, first_column + column)
        scaled = times(kept, tl.load(factor + place))
        above += tl.where(kept > 0, scaled, 0.0)
        below += tl.where(kept < 0, scaled, 0.0)
        many_above += tl.where(kept > 0, 1.0, 0.0)
        many_below += tl.where(kept < 0, 1.0, 0.0)
        if not FREQUENCY:
            total += kept
    if FREQUENCY:
        total = many_above - many_below
    merged = tl.where(total >= 0, above, below)
    merged = merged / tl.maximum(tl.where(total >= 0, many_above, many_below), 1.0)
    there = out + module * rows * columns + row[:, None].to(tl.int64) * columns + column[None, :]
    tl.store(there, merged, mask=(row[:, None] < rows) & (column[None, :] < columns))


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=ANYWHERE)  # type: ignore[untyped-decorator]
def _wanted(  # type: ignore[no-untyped-def]
    left, right, bounds, factor, strictness, out, agreement, n, rows, columns, lm, lr, lk, rm, rk, rc,
    DEPTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The sum, where enough tasks want the entry. Every entry is made twice: what a task wants depends on the sum."""
    module = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for task in range(n):
        entries = product(
            left, right, bounds, module, task, row, column, rows, columns, lm, lr, lk, rm, rk, rc, DEPTH
        )  # fmt: skip
        total += times(entries, tl.load(factor + module * n + task))
    wanted = tl.zeros((ROWS, COLUMNS), tl.int32)
    for task in range(n):
        entries = product(
            left, right, bounds, module, task, row, column, rows, columns, lm, lr, lk, rm, rk, rc, DEPTH
        )  # fmt: skip
        others = tl.load(strictness + module * n + task) * tl.abs(total - entries)
        wanted += (tl.abs(entries) > others).to(tl.int32)
    merged = total * (wanted >= agreement).to(tl.float32)
    there = out + module * rows * columns + row[:, None].to(tl.int64) * columns + column[None, :]
    tl.store(there, merged, mask=(row[:, None] < rows) & (column[None, :] < columns))


def by_count(products: Products, rule: Rule, *, frequency: bool) -> Tensor:
    """Keep what the rule keeps, elect the sign of its sum (or the more frequent one), a tie being +; the mean of what has it,
    each times its factor, (modules, rows, columns) float32. Factors take no part in the election, nor in the divisor."""
    merged = products.empty()
    _by_count[(*products.grid, len(merged))](
        products.left, products.right, products.bounds, rule.factor, *rule.kept, merged,
        len(products.slots), *merged.shape[1:], *products.corner, *products.strides,
        FREQUENCY=frequency, DEPTH=products.depth, ROWS=TILE_ROWS, COLUMNS=TILE_COLUMNS, num_warps=8,
    )  # fmt: skip
    turns.between()
    return merged


def wanted(products: Products, weight: Tensor, strictness: Tensor, agreement: int) -> Tensor:
    """Σ w_i x_i where at least `agreement` tasks have |x_i| > strictness_i · |Σ w_j x_j − x_i|, (modules, rows, columns) float32.

    weight, strictness: (modules, n) float32.
    """
    merged = products.empty()
    _wanted[(*products.grid, len(merged))](
        products.left, products.right, products.bounds, weight.contiguous(), strictness.contiguous(), merged,
        agreement, len(products.slots), *merged.shape[1:], *products.strides,
        DEPTH=products.depth, ROWS=TILE_ROWS, COLUMNS=TILE_COLUMNS, num_warps=8,
    )  # fmt: skip
    turns.between()
    return merged
