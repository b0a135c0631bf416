# SPDX-License-Identifier: Apache-2.0
"""Writes many small matrices, wherever they lie, into one run of memory in a single launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_merge.adapters.pieces import ALIGNED

if TYPE_CHECKING:
    from vllm_merge.adapters.pieces import Pieces

_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
_TILE = 2048
_NARROW = (16, 64, 256)  # columns of a tile, of matrices that are no wider than the widest slot
_UNALIGNED = _NARROW[1:]  # where a thread writes one element at a time
_WIDE = 1024  # of the others
_TILES_EACH = 8  # that a program copies of the largest matrix, one after the other


@triton.jit  # type: ignore[untyped-decorator]
def _copy(  # type: ignore[no-untyped-def]
    entry,
    weights,
    period,
    out,
    pieces,
    most,
    SOURCE: tl.constexpr,
    BYTES: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The tiles of a piece that are this program's. Returns how many lanes met a value that is not finite."""
    source = tl.multiple_of(tl.load(entry).to(tl.pointer_type(SOURCE)), UNIT * BYTES)
    given_rows = tl.load(entry + pieces).to(tl.int32)
    given_columns = tl.multiple_of(tl.load(entry + 2 * pieces).to(tl.int32), UNIT)
    stride = tl.multiple_of(tl.load(entry + 3 * pieces), UNIT)
    rows = tl.load(entry + 4 * pieces).to(tl.int32)
    columns = tl.multiple_of(tl.load(entry + 5 * pieces).to(tl.int32), UNIT)
    target = out + tl.multiple_of(tl.load(entry + 6 * pieces), UNIT)
    target_stride = tl.multiple_of(tl.load(entry + 7 * pieces), UNIT)
    weight_of = tl.load(entry + 8 * pieces)
    weight = tl.load(weights + weight_of % period, mask=weight_of >= 0, other=1.0)
    scale = (tl.load(entry + 9 * pieces).to(tl.float64, bitcast=True) * weight).to(tl.float32)
    across = tl.cdiv(columns, COLUMNS)
    largest = tl.zeros((ROWS, COLUMNS), tl.float32)
    for tile in range(tl.program_id(1), tl.cdiv(rows, ROWS) * across, tl.num_programs(1)):
        row = (tile // across * ROWS + tl.arange(0, ROWS))[:, None]
        column = (tile % across * COLUMNS + tl.arange(0, COLUMNS))[None, :]
        given = (row < given_rows) & (column < given_columns)
        values = tl.load(source + row.to(tl.int64) * stride + column, mask=given, other=0.0).to(tl.float32) * scale
        written = values.to(out.dtype.element_ty)
        tl.store(target + row.to(tl.int64) * target_stride + column, written, mask=(row < rows) & (column < columns))
        largest = tl.maximum(largest, tl.abs(written.to(tl.float32)), propagate_nan=tl.PropagateNan.ALL)
    return tl.sum((~(largest <= most)).to(tl.int32))  # nan is not, either


@triton.jit(do_not_specialize=["pieces", "first", "period"])  # type: ignore[untyped-decorator]
def _gather(  # type: ignore[no-untyped-def]
    table,
    weights,
    period,
    out,
    pieces,
    first,
    most,
    SOURCE: tl.constexpr,
    BYTES: tl.constexpr,
    UNIT: tl.constexpr,
    NARROW: tl.constexpr,
    WIDE: tl.constexpr,
    TILE: tl.constexpr,
):
    entry = table + first + tl.program_id(0)
    if tl.load(entry + 5 * pieces) <= NARROW:  # columns: the others would leave most lanes of a tile idle
        bad = _copy(entry, weights, period, out, pieces, most, SOURCE, BYTES, UNIT, TILE // NARROW, NARROW)
    else:
        bad = _copy(entry, weights, period, out, pieces, most, SOURCE, BYTES, UNIT, TILE // WIDE, WIDE)
    if bad > 0:
        tl.store(weights + period, 1.0)


def gather(table: Tensor, weights: Tensor, out: Tensor, pieces: Pieces, pause: Callable[[], object]) -> None:
    """out[piece] = scaling · weight · source, zero where the source ends, computed in float32.

    table: int64 on the GPU, `pieces.table(…)`. weights: float64 on the GPU, (modules · n + 1,), or fewer that are taken again
    and again; the last number becomes 1 where a value is not finite in out's dtype. out: one run of elements. pause():
    called before every launch.
    """
    widths = _NARROW if pieces.aligned else _UNALIGNED
    narrow = next((columns for columns in widths if pieces.widest <= columns), _WIDE)
    split = max(1, pieces.largest // (_TILE * _TILES_EACH))
    for dtype, first, last in pieces.launches:
        pause()
        _gather[(last - first, split)](
            table,
            weights,
            len(weights) - 1,
            out,
            pieces.count,
            first,
            torch.finfo(out.dtype).max,
            SOURCE=_TYPES[dtype],
            BYTES=dtype.itemsize,
            UNIT=ALIGNED if pieces.aligned else 1,
            NARROW=narrow,
            WIDE=_WIDE,
            TILE=_TILE,
            num_warps=4,
        )
