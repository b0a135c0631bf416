# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel that writes a whole LoRA slot; imported only where there is a GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@triton.jit(do_not_specialize=["slot"])  # type: ignore[untyped-decorator]
def _fill_slot(tiles, targets, table, slot, TILE: tl.constexpr, TYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    program = tl.program_id(0)
    item = tl.load(tiles + 2 * program)
    start = tl.load(tiles + 2 * program + 1)
    target = tl.load(targets + 3 * item).to(tl.pointer_type(TYPE))
    size = tl.load(targets + 3 * item + 1)
    columns = tl.load(targets + 3 * item + 2).to(tl.int32)
    source = tl.load(table + 4 * item).to(tl.pointer_type(TYPE))
    source_rows = tl.load(table + 4 * item + 1).to(tl.int32)
    source_columns = tl.load(table + 4 * item + 2).to(tl.int32)
    stride = tl.load(table + 4 * item + 3)
    at = start.to(tl.int32) + tl.arange(0, TILE)  # a layer's buffer of one slot has fewer than 2**31 elements
    row = at // columns
    column = at - row * columns
    given = (row < source_rows) & (column < source_columns)
    values = tl.load(source + row.to(tl.int64) * stride + column, mask=given, other=0.0)
    tl.store(target + slot.to(tl.int64) * size + at, values, mask=at < size)


def fill_slot(tiles: Tensor, targets: Tensor, table: Tensor, slot: int, tile: int, dtype: torch.dtype) -> None:
    """Write slot `slot` of every buffer. tiles: (programs, 2) int64 of buffer and first element; targets: (buffers, 3) int64
    of address, elements and columns of a slot; table: (buffers, 4) int64 of the sources' address, rows, columns, row stride.
    """
    _fill_slot[(tiles.shape[0],)](tiles, targets, table, slot, TILE=tile, TYPE=_TYPES[dtype], num_warps=8)
