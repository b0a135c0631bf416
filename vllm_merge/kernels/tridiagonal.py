# SPDX-License-Identifier: Apache-2.0
"""Eigendecomposition of many small symmetric matrices at once, a matrix per program, in float64.

Householder reflections make a matrix tridiagonal, A = Q T Qᵀ, with all of it in the registers of one program; implicit QL
steps with Wilkinson's shift make T diagonal, and their rotations turn the columns of Q into the eigenvectors (Golub and Van
Loan, Matrix Computations, 4th ed., algorithms 8.3.1 and 8.3.3). Both are backward stable: eigenvalues that lie close together
and null spaces need no special case.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_merge.kernels import turns

LARGEST = 128  # rows; a matrix of 256 does not fit into the registers of a program
ACCEPTED = 1e-11  # of VᵀG − ΛVᵀ, relative to the largest entry of G, and of orthonormality
_STEPS = 40  # QL steps for one eigenvalue; it takes two
_NEGLIGIBLE = 2e-16  # of an entry beside the diagonal, relative to 1 and its neighbours on it


# A batch may be a part of another, or turned: where it begins and its strides say nothing.
@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=["size", "stride", "down", "across"], do_not_specialize_on_alignment=["matrices", "scales"]
)
def _reflect(  # type: ignore[no-untyped-def]
    matrices, scales, transposed, diagonal, beside, size, stride, down, across, N: tl.constexpr
):
    """The largest entry of a matrix, and of the matrix divided by it T's diagonal, the entries beside it, and Qᵀ; (N, N), N a
    power of two of at least 4, rows and columns of zeros behind those of the matrix. stride, down, across: from one matrix, row
    and column to the next.
    """
    program = tl.program_id(0).to(tl.int64)
    rows = tl.arange(0, N)
    columns = tl.arange(0, N)
    inside = (rows[:, None] < size) & (columns[None, :] < size)
    a = tl.load(matrices + program * stride + rows[:, None] * down + columns[None, :] * across, mask=inside, other=0.0)
    scale = tl.maximum(tl.max(tl.max(tl.abs(a), 1), 0), 2.2250738585072014e-308)
    tl.store(scales + program, scale)
    a = a / scale
    count = tl.minimum(size - 1, N - 2)  # of reflections
    reflections = transposed + program * N * N  # row k holds reflection k until Qᵀ takes its place
    for k in range(count):
        column = tl.sum(tl.where(columns[None, :] == k, a, 0.0), 1)
        below = tl.where(rows > k, column, 0.0)
        first = tl.sum(tl.where(rows == k + 1, column, 0.0), 0)
        length = tl.sqrt(tl.sum(below * below, 0))
        end = tl.where(first > 0, -length, length)  # away from the first entry, so that nothing cancels
        square_of_v = 2.0 * length * (length + tl.abs(first))
        there = square_of_v > 0.0
        scale = tl.where(there, 1.0 / tl.sqrt(tl.where(there, square_of_v, 1.0)), 0.0)
        u = tl.where(rows == k + 1, first - end, below) * scale
        # H A H with H = I − 2 u uᵀ: u (p − (u·p) u)ᵀ and its transpose are taken away, p = 2 A u.
        p = 2.0 * tl.sum(a * u[None, :], 1)
        w = p - tl.sum(u * p, 0) * u
        a = a - u[:, None] * w[None, :] - w[:, None] * u[None, :]
        tl.store(reflections + k * N + rows, u)
        tl.store(diagonal + program * N + k, tl.sum(tl.where(rows == k, column, 0.0), 0))
        tl.store(beside + program * N + k, tl.where(there, end, first))
    here = tl.sum(tl.where(rows[:, None] == columns[None, :], a, 0.0), 0)
    below = tl.sum(tl.where(rows[:, None] == columns[None, :] + 1, a, 0.0), 0)
    tl.store(diagonal + program * N + columns, here, mask=columns >= count)
    tl.store(beside + program * N + columns, below, mask=columns >= count)
    tl.debug_barrier()  # every reflection is stored
    q = tl.where(rows[:, None] == columns[None, :], 1.0, 0.0).to(tl.float64)
    for step in range(count):
        u = tl.load(reflections + (count - 1 - step) * N + rows)
        q = q - 2.0 * u[:, None] * tl.sum(u[:, None] * q, 0)[None, :]
    tl.debug_barrier()  # and read
    tl.store(reflections + columns[None, :] * N + rows[:, None], q)


@triton.jit  # type: ignore[untyped-decorator]
def _end_of_block(diagonal, beside, start, size, limit, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first index from `start` on behind which the entry beside the diagonal is negligible."""
    index = tl.arange(0, N)
    inside = index < size - 1
    here = tl.abs(tl.load(diagonal + index))
    following = tl.abs(tl.load(diagonal + index + 1, mask=inside, other=0.0))
    entry = tl.abs(tl.load(beside + index))
    small = (entry <= limit * (here + following + 1.0)) | (index >= size - 1)
    return tl.min(tl.where(small & (index >= start), index, N), 0)


# A byte for each matrix: where those of a part begin says nothing.
@triton.jit(do_not_specialize=["size"], do_not_specialize_on_alignment=["converged"])  # type: ignore[untyped-decorator]
def _rotate(diagonals, besides, vectors, converged, size, steps, limit, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """T's eigenvalues onto its diagonal, and the eigenvectors of A, by rows, into the place of Qᵀ."""
    program = tl.program_id(0).to(tl.int64)
    diagonal = diagonals + program * N
    beside = besides + program * N
    rows = vectors + program * N * N
    lane = tl.arange(0, N)
    good = size > 0
    for start in range(size):
        end = _end_of_block(diagonal, beside, start, size, limit, N)
        left = steps
        while (end > start) & (left > 0):
            first = tl.load(diagonal + start)
            entry = tl.load(beside + start)
            ratio = (tl.load(diagonal + start + 1) - first) / (2.0 * entry)
            root = tl.sqrt(ratio * ratio + 1.0)
            upper = tl.load(diagonal + end)
            g = upper - first + entry / (ratio + tl.where(ratio >= 0, root, -root))
            s = g * 0.0 + 1.0
            c = g * 0.0 + 1.0
            shift = g * 0.0
            carried = tl.load(rows + end * N + lane)
            # One ahead: what is loaded is not written before it is used.
            here = tl.load(diagonal + end - 1)
            next_to_it = tl.load(beside + end - 1)
            row = tl.load(rows + (end - 1) * N + lane)
            for turn in range(end - start):
                i = end - 1 - turn
                ahead = tl.maximum(i - 1, 0)
                here_ahead = tl.load(diagonal + ahead)
                next_ahead = tl.load(beside + ahead)
                row_ahead = tl.load(rows + ahead * N + lane)
                f = s * next_to_it
                b = c * next_to_it
                square = f * f + g * g
                there = square > 1e-290  # no rotation where there is nothing to rotate
                inverse = tl.rsqrt(tl.where(there, square, 1.0))
                s = tl.where(there, f * inverse, 0.0)
                c = tl.where(there, g * inverse, 1.0)
                # The first turn's would be the entry behind the block, which is negligible and stays so.
                tl.store(beside + i + 1, tl.where(there, square * inverse, 0.0), mask=turn > 0)
                g = upper - shift
                r = (here - g) * s + 2.0 * c * b
                shift = s * r
                tl.store(diagonal + i + 1, g + shift)
                g = c * r - b
                tl.store(rows + (i + 1) * N + lane, s * row + c * carried)
                carried = c * row - s * carried
                upper = here
                here = here_ahead
                next_to_it = next_ahead
                row = row_ahead
            tl.store(rows + start * N + lane, carried)
            tl.store(diagonal + start, upper - shift)
            tl.store(beside + start, g)
            tl.debug_barrier()  # every store of the step, before the next one loads
            left -= 1
            end = _end_of_block(diagonal, beside, start, size, limit, N)
        good = good & (end <= start)
    tl.store(converged + program, good.to(tl.int8))


@triton.jit(
    do_not_specialize=["size"], do_not_specialize_on_alignment=["applied", "products", "values", "vectors", "right"]
)  # type: ignore[untyped-decorator]
def _order(  # type: ignore[no-untyped-def]
    diagonals,
    rows,
    scales,
    converged,
    applied,
    products,
    values,
    vectors,
    right,
    size,
    accepted,
    N: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Eigenvalues and eigenvectors, the largest first, and whether VᵀG = ΛVᵀ and VᵀV = 1: applied and products are VᵀG and VᵀV,
    (size, size), G the matrix as it was given.
    """
    program = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, N)
    there = lane < size
    scale = tl.load(scales + program)
    every = tl.load(diagonals + program * N + lane)
    away = tl.zeros((ROWS, N), tl.float64)
    for first in range(0, size, ROWS):
        index = first + tl.arange(0, ROWS)
        value = tl.load(diagonals + program * N + index, mask=index < size, other=0.0)
        before = (every[None, :] > value[:, None]) | (
            (every[None, :] == value[:, None]) & (lane[None, :] < index[:, None])
        )
        place = tl.sum((before & there[None, :]).to(tl.int32), 1)
        inside = (index[:, None] < size) & there[None, :]
        vector = tl.load(rows + program * N * N + index[:, None] * N + lane[None, :], mask=inside, other=0.0)
        entry = program * size * size + index[:, None] * size + lane[None, :]
        stretched = tl.load(applied + entry, mask=inside, other=0.0) / scale
        product = tl.load(products + entry, mask=inside, other=0.0)
        one = tl.where(inside & (index[:, None] == lane[None, :]), 1.0, 0.0).to(tl.float64)
        off = tl.maximum(
            tl.abs(stretched - value[:, None] * vector), tl.abs(product - one), propagate_nan=tl.PropagateNan.ALL
        )
        away = tl.maximum(away, off, propagate_nan=tl.PropagateNan.ALL)
        tl.store(values + program * size + place, value * scale, mask=index < size)
        tl.store(vectors + program * size * size + lane[None, :] * size + place[:, None], vector, mask=inside)
    wrong = tl.sum(tl.sum((~(away < accepted)).to(tl.int32), 1), 0)  # nan is not, either
    tl.store(right + program, ((wrong == 0) & (tl.load(converged + program) > 0)).to(tl.int8))


def diagonalized(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of matrices as `eigh` takes them, n the next power of two: eigenvalues in no order, divided by the largest entry, (batch,
    n); eigenvectors by rows (batch, n, n); the largest entries, and for which the steps sufficed, (batch,).
    """
    batch, k = matrices.shape[:2]
    n = max(4, triton.next_power_of_2(k))
    rows = matrices.new_empty(batch, n, n)
    diagonal, beside = matrices.new_empty(2, batch, n).unbind()
    scales = matrices.new_empty(batch)
    converged = torch.empty(batch, dtype=torch.int8, device=matrices.device)
    for part in turns.pieces(batch, matrices.device):
        programs, outer, inner = (part.stop - part.start,), rows[part], (diagonal[part], beside[part])
        _reflect[programs](
            matrices[part],
            scales[part],
            outer,
            *inner,
            k,
            *matrices.stride(),
            N=n,
            num_warps=max(1, min(16, n * n // 1024)),
        )
        turns.between()
        _rotate[programs](*inner, outer, converged[part], k, _STEPS, _NEGLIGIBLE, N=n, num_warps=1)
        turns.between()
    return diagonal, rows, scales, converged


def ordered(
    diagonal: Tensor, rows: Tensor, scales: Tensor, converged: Tensor, applied: Tensor, products: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`eigh`'s result of that of `diagonalized`, and of VᵀG and VᵀV, (batch, k, k)."""
    batch, k = applied.shape[:2]
    n = diagonal.shape[1]
    values, vectors, right = applied.new_empty(batch, k), torch.empty_like(applied), torch.empty_like(converged)
    several = min(n, 16)
    _order[(batch,)](
        diagonal, rows, scales, converged, applied, products, values, vectors, right, k, ACCEPTED, N=n, ROWS=several
    )
    return values, vectors, right


def eigh(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues (batch, k), eigenvectors (batch, k, k), the largest first, and whether they are right (batch,), int8.

    matrices: symmetric (batch, k, k) float64, k at most 128.
    """
    k = matrices.shape[1]
    diagonal, rows, scales, converged = diagonalized(matrices)
    vectors = rows[:, :k, :k]
    return ordered(diagonal, rows, scales, converged, vectors @ matrices, vectors @ vectors.mT)
