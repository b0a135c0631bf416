# SPDX-License-Identifier: Apache-2.0
"""Writes many small matrices, wherever they lie, into one array in a single launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
_TILE = 4096


@triton.jit  # type: ignore[untyped-decorator]
def _gather(  # type: ignore[no-untyped-def]
    table, scales, out, overflow, most, TILE: tl.constexpr, SOURCE: tl.constexpr
):
    piece = tl.program_id(0)
    entry = table + 7 * piece
    source = tl.load(entry).to(tl.pointer_type(SOURCE))
    given_rows = tl.load(entry + 1).to(tl.int32)
    given_columns = tl.load(entry + 2).to(tl.int32)
    source_stride = tl.load(entry + 3)
    rows = tl.load(entry + 4).to(tl.int32)
    columns = tl.load(entry + 5).to(tl.int32)
    target = tl.load(entry + 6)
    target_stride = tl.load(table + 7 * tl.num_programs(0))
    at = tl.program_id(1) * TILE + tl.arange(0, TILE)
    row = at // columns
    column = at - row * columns
    given = (row < given_rows) & (column < given_columns)
    values = tl.load(source + row.to(tl.int64) * source_stride + column, mask=given, other=0.0).to(tl.float32)
    values *= tl.load(scales + piece)
    place = out + target + row.to(tl.int64) * target_stride + column
    tl.store(place, values.to(out.dtype.element_ty), mask=row < rows)
    if tl.sum((~(tl.abs(values) <= most)).to(tl.int32)) > 0:  # nan is not, either
        tl.store(overflow, 1)


def gather(table: Tensor, scales: Tensor, out: Tensor, overflow: Tensor, largest: int, dtype: torch.dtype) -> None:
    """out[piece] = scale · source, zero where the source ends, computed in float32.

    table: int64 on the GPU, per piece 7 numbers (the source's address, rows, columns and row stride; rows and columns to
    write; first element in out), then the row stride of out. scales: (pieces,) float32. largest: elements of the
    largest piece. dtype: of the sources. overflow: one int32, set to 1 where a value is not finite in out's dtype. Strides
    count elements.
    """
    pieces = scales.shape[0]
    _gather[(pieces, triton.cdiv(largest, _TILE))](
        table, scales, out, overflow, torch.finfo(out.dtype).max, TILE=_TILE, SOURCE=_TYPES[dtype], num_warps=4
    )
