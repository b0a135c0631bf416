# SPDX-License-Identifier: Apache-2.0
"""Powers of M = Σ_i M_i V Vᵀ M_iᵀ times a few columns, for many modules at once, a module per program, in float64.

M = Pᵀ P with P = [M_1 V … M_n V]ᵀ, which is small: it is made once, and M never is.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

LARGEST = 128  # rows, columns, terms of all tasks, and columns of P
WIDEST = 32  # columns that are multiplied, and terms of a task
_DEPTH = 16  # of what is multiplied at a time
_NUMBERS = ["rows", "cols", "terms", "wide", "width", "times"]
_MATRICES = ["out", "into", "far", "near", "inner", "products", "between", "columns", "image"]


@triton.jit  # type: ignore[untyped-decorator]
def _product(left, along, across, right, tall, deep, wide, S: tl.constexpr, P: tl.constexpr, DEPTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """(S, P): a matrix (tall, deep) of these strides times one (deep, wide) whose rows lie one after the other."""
    row = tl.arange(0, S)
    index = tl.arange(0, P)
    depth = tl.arange(0, DEPTH)
    found = tl.zeros((S, P), tl.float64)
    for begin in range(0, deep, DEPTH):
        here = begin + depth
        one = (row[:, None] < tall) & (here[None, :] < deep)
        other = (here[:, None] < deep) & (index[None, :] < wide)
        x = tl.load(left + row[:, None] * along + here[None, :] * across, mask=one, other=0.0)
        y = tl.load(right + here[:, None] * wide + index[None, :], mask=other, other=0.0)
        found = tl.dot(x, y, found, out_dtype=tl.float64)
    return found


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_MATRICES)  # type: ignore[untyped-decorator]
def _powers(  # type: ignore[no-untyped-def]
    out, into, far, near, inner, products, between, columns, image, rows, cols, terms, wide, width, times,
    S: tl.constexpr, P: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, S)
    index = tl.arange(0, P)
    tasks = terms // width
    deep = tasks * wide
    out += program * terms * rows
    into += program * terms * cols
    far += program * cols * wide
    near += program * rows * wide
    inner += program * terms * wide
    products += program * deep * rows
    between += program * deep * wide
    columns += program * rows * wide
    image += program * rows * wide
    made = _product(into, cols, 1, far, terms, cols, wide, S, P, DEPTH)
    of_terms = row[:, None] * wide + index[None, :]
    tl.store(inner + of_terms, made, mask=(row[:, None] < terms) & (index[None, :] < wide))
    tl.debug_barrier()  # it is stored
    across = (index[:, None] < wide) & (row[None, :] < rows)
    for task in range(tasks):
        first = task * width
        term = tl.arange(0, P)
        one = tl.load(
            inner + (first + term[None, :]) * wide + index[:, None],
            mask=(term[None, :] < width) & (index[:, None] < wide),
            other=0.0,
        )
        other = tl.load(
            out + (first + term[:, None]) * rows + row[None, :],
            mask=(term[:, None] < width) & (row[None, :] < rows),
            other=0.0,
        )
        part = tl.dot(one, other, out_dtype=tl.float64)
        tl.store(products + (task * wide + index[:, None]) * rows + row[None, :], part, mask=across)
    tl.debug_barrier()
    source = near
    of_columns = row[:, None] * wide + index[None, :]
    inside = (row[:, None] < rows) & (index[None, :] < wide)
    for time in range(times + 1):
        middle = _product(products, rows, 1, source, deep, rows, wide, S, P, DEPTH)
        tl.store(between + of_columns, middle, mask=(row[:, None] < deep) & (index[None, :] < wide))
        tl.debug_barrier()  # it is stored, and the columns are read
        found = _product(products, 1, rows, between, rows, deep, wide, S, P, DEPTH)
        source = columns
        target = columns if time < times else image
        tl.store(target + of_columns, found, mask=inside)
        tl.debug_barrier()


def fits(tasks: int, width: int, rows: int, cols: int, wide: int) -> bool:
    """Whether tasks of this many terms each do, of these rows and columns, times this many columns."""
    return max(rows, cols, tasks * width, tasks * wide) <= LARGEST and max(wide, width) <= WIDEST


class Powers:
    """M^times X and M^(times + 1) X of M_i = out_iᵀ into_i, for one V and X after the other.

    out: (modules, K, rows), into: (modules, K, cols), float64, contiguous; the terms of task i from i · width on, of K. wide:
    columns of V and X. times: at least 1.
    """

    def __init__(self, out: Tensor, into: Tensor, width: int, wide: int, times: int) -> None:
        modules, terms, rows = out.shape
        tasks = terms // width
        self._tasks = (out, into)
        shapes = ((terms, wide), (tasks * wide, rows), (tasks * wide, wide), (rows, wide), (rows, wide))
        self._made = [out.new_empty(modules, *shape) for shape in shapes]
        self._numbers = (rows, into.shape[2], terms, wide, width, times)
        size = max(16, int(triton.next_power_of_2(max(rows, terms, tasks * wide))))
        padded = max(16, int(triton.next_power_of_2(max(wide, width))))
        # Sixteen warps of 128 registers a thread; with more stages they would not do.
        self._constants = {"S": size, "P": padded, "DEPTH": _DEPTH, "num_warps": max(4, size // 8), "num_stages": 2}

    def __call__(self, far: Tensor, near: Tensor) -> tuple[Tensor, Tensor]:
        """Both, (modules, rows, wide), until the next call. far: V, (modules, cols, wide), near: X, (modules, rows, wide), contiguous."""
        _powers[(len(near),)](*self._tasks, far, near, *self._made, *self._numbers, **self._constants)
        return self._made[3], self._made[4]
