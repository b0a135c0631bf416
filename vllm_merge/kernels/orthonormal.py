# SPDX-License-Identifier: Apache-2.0
"""Orthonormal columns of many small matrices at once, a matrix per program, in float64: a step of subspace iteration.

By the modified Gram–Schmidt process (Golub and Van Loan, Matrix Computations, 4th ed., §5.2.8), which does not mind columns of
unlike size; what it loses where they are nearly dependent is in what `advance` measures. A column of zeros stays one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST = (
    8192  # entries, rows and columns rounded up to powers of two: two such matrices fit into a program's registers
)
_ENTRIES_OF_A_WARP = 512
# What is not worth a compilation each: sizes, and whether a matrix of odd size begins at an even place.
_NUMBERS = ["batch", "rows", "wide"]
_MATRICES = ["columns", "image", "found", "measured"]


@triton.jit  # type: ignore[untyped-decorator]
def _gram_schmidt(x, y, wide, P: tl.constexpr):  # type: ignore[no-untyped-def]
    """X of orthonormal columns, and Y, to whose columns the same is done; columns from `wide` on are padding."""
    index = tl.arange(0, P)
    for j in range(wide):
        here = index[None, :] == j
        column = tl.sum(tl.where(here, x, 0.0), 1)
        other = tl.sum(tl.where(here, y, 0.0), 1)
        square = tl.sum(column * column, 0)
        there = square > 0.0
        inverse = tl.where(there, 1.0 / tl.where(there, square, 1.0), 0.0)
        root = tl.sqrt(inverse)
        along = tl.where(index > j, tl.sum(x * column[:, None], 0) * inverse, 0.0)
        x = tl.where(here, column[:, None] * root, x - column[:, None] * along[None, :])
        y = tl.where(here, other[:, None] * root, y - other[:, None] * along[None, :])
    return x, y


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_MATRICES)  # type: ignore[untyped-decorator]
def _orthonormalize(columns, found, rows, wide, N: tl.constexpr, P: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.arange(0, N)[:, None]
    index = tl.arange(0, P)[None, :]
    place = tl.program_id(0).to(tl.int64) * rows * wide + row * wide + index
    inside = (row < rows) & (index < wide)
    x = tl.load(columns + place, mask=inside, other=0.0)
    x, _ = _gram_schmidt(x, x, wide, P)
    tl.store(found + place, x, mask=inside)


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_MATRICES)  # type: ignore[untyped-decorator]
def _advance(  # type: ignore[no-untyped-def]
    columns, image, found, measured, batch, rows, wide, N: tl.constexpr, P: tl.constexpr
):
    program = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, N)[:, None]
    index = tl.arange(0, P)
    place = program * rows * wide + row * wide + index[None, :]
    inside = (row < rows) & (index[None, :] < wide)
    y = tl.load(columns + place, mask=inside, other=0.0)
    z = tl.load(image + place, mask=inside, other=0.0)
    y, z = _gram_schmidt(y, z, wide, P)
    values = tl.sum(y * z, 0)
    least = tl.min(tl.where(tl.sum(y * y, 0) > 0.0, values, float("inf")), 0)
    away = tl.sum(values * 0.0, 0)
    for j in range(wide):
        column = tl.sum(tl.where(index[None, :] == j, z, 0.0), 1)
        rest = column - tl.sum(y * tl.sum(y * column[:, None], 0)[None, :], 1)
        away += tl.sum(rest * rest, 0)
    tl.store(measured + program, tl.sum(values, 0))
    tl.store(measured + batch + program, tl.sqrt(away))
    tl.store(measured + 2 * batch + program, tl.max(values, 0))
    tl.store(measured + 3 * batch + program, least)
    z, _ = _gram_schmidt(z, z, wide, P)
    tl.store(found + place, z, mask=inside)


def fits(rows: int, wide: int) -> bool:
    """Whether matrices of this shape do."""
    n, p, _ = _sizes(rows, wide)
    return n * p <= LARGEST


def orthonormalize(columns: Tensor) -> Tensor:
    """An orthonormal basis of the columns (batch, rows, p), contiguous, float64; k columns of it span what the first k do."""
    batch, rows, wide = columns.shape
    n, p, warps = _sizes(rows, wide)
    found = torch.empty_like(columns)
    _orthonormalize[(batch,)](columns, found, rows, wide, N=n, P=p, num_warps=warps)
    return found


def advance(columns: Tensor, image: Tensor, found: Tensor, measured: Tensor) -> None:
    """With Y the orthonormal basis of the columns X, write that of Z = M Y into `found`, from X and the image M X.

    All (batch, rows, p), contiguous, float64. measured: (4, batch), written: the trace of YᵀZ, ‖Z − Y YᵀZ‖_F, and the largest and
    the least entry on the diagonal of YᵀZ, where Y has a column.
    """
    batch, rows, wide = columns.shape
    n, p, warps = _sizes(rows, wide)
    _advance[(batch,)](columns, image, found, measured, batch, rows, wide, N=n, P=p, num_warps=warps)


def _sizes(rows: int, wide: int) -> tuple[int, int, int]:
    """Rows and columns in registers, and the warps that hold them; few different ones, each of which is compiled."""
    n, p = (max(16, int(triton.next_power_of_2(size))) for size in (rows, wide))
    return n, p, max(1, min(16, n * p // _ENTRIES_OF_A_WARP))
