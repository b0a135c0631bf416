# SPDX-License-Identifier: Apache-2.0
"""Entrywise rules over products left_i @ right_i that are never stored: every entry is made where it is used.

The products are float32 sums in the order of the terms (no TF32), by the same code in every kernel here and in `selection`, so
that a threshold that one kernel finds is met exactly by the entries that another makes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_merge.kernels import turns
from vllm_merge.kernels.masks import keep

TILE_ROWS, TILE_COLUMNS = 64, 64
# Numbers whose values, and pointers whose alignment, are not worth a compilation each: of `left`, terms are read one by one.
COUNTS = ["first", "owners_per_module", "low", "digit_width", "width", "n", "rows", "first_row", "first_column"]
COUNTS += ["lm", "lr", "owners", "guesses", "agreement"]
ANYWHERE = ["left", "weight", "factor", "least", "most", "keys", "limits", "majority", "strictness"]
ANYWHERE += ["lowest", "highest", "shift"]


@dataclass(frozen=True)
class Products:
    """n products per module. left: (modules, rows, K), right: (modules, K, columns), float32; task i has slots[i] of K.

    modules: where these stand among all modules of a merge. corner: where their first row and column stand in a module.
    """

    left: Tensor
    right: Tensor
    slots: Sequence[slice]
    modules: slice
    corner: tuple[int, int] = (0, 0)

    @cached_property
    def bounds(self) -> Tensor:
        """(n, 2) int32: start and end of every slot."""
        flat = [(slot.start, slot.stop) for slot in self.slots]
        return torch.tensor(flat, dtype=torch.int32).to(self.left.device, non_blocking=True)

    @property
    def depth(self) -> int:
        """Terms of the longest product, padded for the matrix units."""
        longest = max(slot.stop - slot.start for slot in self.slots)
        return max(16, int(triton.next_power_of_2(longest)))

    @property
    def grid(self) -> tuple[int, int]:
        """Blocks of rows and of columns."""
        return triton.cdiv(self.left.shape[1], TILE_ROWS), triton.cdiv(self.right.shape[2], TILE_COLUMNS)

    @property
    def strides(self) -> tuple[int, ...]:
        """Of left and right, in elements."""
        return (*self.left.stride(), *self.right.stride())

    def empty(self) -> Tensor:
        """Room for merged entries, (modules, rows, columns) float32."""
        return torch.empty(*self.left.shape[:2], self.right.shape[2], device=self.left.device)


@dataclass(frozen=True)
class Rule:
    """Which entries of a task are kept at a module, and what they are multiplied with; each (modules, n).

    weight: float32. scale: float32, beside the weight, None for 1. least, most: float32, of a magnitude that is kept, None
    for no bound. keys, limits: int64, of a mask (`algebra.masks`), None where nothing is dropped at random.
    """

    weight: Tensor
    scale: Tensor | None = None
    least: Tensor | None = None
    most: Tensor | None = None
    keys: Tensor | None = None
    limits: Tensor | None = None

    @property
    def factor(self) -> Tensor:
        """What is kept is multiplied with."""
        return (self.weight if self.scale is None else self.weight * self.scale).contiguous()

    @property
    def kept(self) -> tuple[Tensor | None, ...]:
        """What the kernels are told of it, contiguous."""
        parts = (self.least, self.most, self.keys, self.limits)
        return tuple(None if part is None else part.contiguous() for part in parts)


@triton.jit  # type: ignore[untyped-decorator]
def product(  # type: ignore[no-untyped-def]
    left, right, bounds, module, task, row, column, rows, columns, lm, lr, lk, rm, rk, rc, DEPTH: tl.constexpr
):
    """Entries (row, column) of one task at one module, zero outside."""
    start = tl.load(bounds + 2 * task)
    end = tl.load(bounds + 2 * task + 1)
    term = start + tl.arange(0, DEPTH)
    inside = term < end
    a = tl.load(
        left + module * lm + row[:, None].to(tl.int64) * lr + term[None, :] * lk,
        mask=(row[:, None] < rows) & inside[None, :],
        other=0.0,
    )
    b = tl.load(
        right + module * rm + term[:, None].to(tl.int64) * rk + column[None, :] * rc,
        mask=inside[:, None] & (column[None, :] < columns),
        other=0.0,
    )
    return tl.dot(a, b, input_precision="ieee", out_dtype=tl.float32)


@triton.jit
def trimmed(entries, least, most, keys, limits, place, row, column):  # type: ignore[no-untyped-def]
    """The entries of a task that its rule keeps, zero elsewhere. place: of the task's numbers at the module."""
    if least is not None:
        entries = tl.where(tl.abs(entries) >= tl.load(least + place), entries, 0.0)
    if most is not None:
        entries = tl.where(tl.abs(entries) <= tl.load(most + place), entries, 0.0)
    if keys is not None:
        entries = tl.where(keep(tl.load(keys + place), tl.load(limits + place), row, column), entries, 0.0)
    return entries


@triton.jit
def times(entries, factor):  # type: ignore[no-untyped-def]
    """Rounded before anything is added to it: in one step with a sum, x and −x would not cancel."""
    return tl.fma(entries, factor, 0.0)


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=ANYWHERE)  # type: ignore[untyped-decorator]
def _elect(  # type: ignore[no-untyped-def]
    left, right, bounds, weight, factor, least, most, keys, limits, majority, out, counts, undecided,
    n, rows, columns, first_row, first_column, lm, lr, lk, rm, rk, rc,
    MEAN: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """TIES from its thresholds or masks: trim, elect, average; without `out`, vote alone.

    Every entry is made once: both signs are summed up until one is elected.
    """
    module = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    above = tl.zeros((ROWS, COLUMNS), tl.float32)
    below = tl.zeros((ROWS, COLUMNS), tl.float32)
    weight_above = tl.zeros((ROWS, COLUMNS), tl.float32)
    weight_below = tl.zeros((ROWS, COLUMNS), tl.float32)
    for task in range(n):
        entries = product(
            left, right, bounds, module, task, row, column, rows, columns, lm, lr, lk, rm, rk, rc, DEPTH
        )  # fmt: skip
        place = module * n + task
        kept = trimmed(entries, least, most, keys, limits, place, first_row + row, first_column + column)
        kept = times(kept, tl.load(factor + place))
        total += kept
        if out is not None:
            above += tl.maximum(kept, 0.0)
            below += tl.minimum(kept, 0.0)
            if MEAN:
                mine = tl.load(weight + place)
                weight_above += tl.where(kept > 0, tl.abs(mine), 0.0)
                weight_below += tl.where(kept < 0, tl.abs(mine), 0.0)
    sign = tl.where(total > 0, 1.0, tl.where(total < 0, -1.0, 0.0))
    votes = tl.sum(sign.to(tl.int32))
    tl.atomic_add(counts + 3 * module + 2, votes.to(tl.int64), sem="relaxed")
    if out is not None:
        kept_by_any = (above > 0) | (below < 0)
        sign = tl.where((total == 0) & kept_by_any, tl.load(majority + module), sign)
        merged = tl.where(sign > 0, above, tl.where(sign < 0, below, 0.0))
        if MEAN:
            divisor = tl.where(sign > 0, weight_above, weight_below)
            merged = merged / tl.where(divisor > 0, divisor, 1.0)
        inside = (row[:, None] < rows) & (column[None, :] < columns)
        there = out + module * rows * columns + row[:, None].to(tl.int64) * columns + column[None, :]
        tl.store(there, merged, mask=inside)
        conflicts = (above > 0) & (below < 0)
        tl.atomic_add(counts + 3 * module, tl.sum(kept_by_any.to(tl.int32)).to(tl.int64), sem="relaxed")
        tl.atomic_add(counts + 3 * module + 1, tl.sum(conflicts.to(tl.int32)).to(tl.int64), sem="relaxed")
        if tl.sum(((total == 0) & kept_by_any).to(tl.int32)) > 0:
            tl.store(undecided, 1)


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=ANYWHERE)  # type: ignore[untyped-decorator]
def _add(  # type: ignore[no-untyped-def]
    left, right, bounds, factor, least, most, keys, limits, out, n, rows, columns, first_row, first_column,
    lm, lr, lk, rm, rk, rc,
    DEPTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The sum of what the tasks keep."""
    module = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for task in range(n):
        entries = product(
            left, right, bounds, module, task, row, column, rows, columns, lm, lr, lk, rm, rk, rc, DEPTH
        )  # fmt: skip
        place = module * n + task
        kept = trimmed(entries, least, most, keys, limits, place, first_row + row, first_column + column)
        total += times(kept, tl.load(factor + place))
    there = out + module * rows * columns + row[:, None].to(tl.int64) * columns + column[None, :]
    tl.store(there, total, mask=(row[:, None] < rows) & (column[None, :] < columns))


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=ANYWHERE)  # type: ignore[untyped-decorator]
def _magnitudes(  # type: ignore[no-untyped-def]
    left, right, bounds, least, most, keys, limits, sums, n, rows, columns, first_row, first_column,
    lm, lr, lk, rm, rk, rc,
    DEPTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sums of all magnitudes of a block, and of those that are kept, for every block, module and task."""
    module = (tl.program_id(2) // n).to(tl.int64)
    task = tl.program_id(2) % n
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    entries = product(
        left, right, bounds, module, task, row, column, rows, columns, lm, lr, lk, rm, rk, rc, DEPTH
    )  # fmt: skip
    kept = trimmed(entries, least, most, keys, limits, module * n + task, first_row + row, first_column + column)
    block = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
    there = sums + 2 * (block * tl.num_programs(2) + tl.program_id(2))
    tl.store(there, tl.sum(tl.abs(entries)))
    tl.store(there + 1, tl.sum(tl.abs(kept)))


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=ANYWHERE)  # type: ignore[untyped-decorator]
def _signs(  # type: ignore[no-untyped-def]
    left, right, bounds, weight, counts, n, rows, columns, lm, lr, lk, rm, rk, rc,
    DEPTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Count where tasks differ in sign, and where any is not zero."""
    module = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    most = tl.zeros((ROWS, COLUMNS), tl.float32)
    least = tl.zeros((ROWS, COLUMNS), tl.float32)
    for task in range(n):
        entries = product(
            left, right, bounds, module, task, row, column, rows, columns, lm, lr, lk, rm, rk, rc, DEPTH
        )  # fmt: skip
        mine = tl.load(weight + module * n + task)
        entries *= tl.where(mine > 0, 1.0, tl.where(mine < 0, -1.0, 0.0))
        most = tl.maximum(most, entries)
        least = tl.minimum(least, entries)
    differ = tl.sum(((most > 0) & (least < 0)).to(tl.int32))
    some = tl.sum(((most > 0) | (least < 0)).to(tl.int32))
    tl.atomic_add(counts + 2 * module, differ.to(tl.int64), sem="relaxed")
    tl.atomic_add(counts + 2 * module + 1, some.to(tl.int64), sem="relaxed")


@dataclass(frozen=True)
class Elected:
    """merged: (modules, rows, columns) float32. counts: (modules, 2) int64, entries that any task keeps, and those of
    them at which tasks differ in sign. votes: (modules,) int64, the signs of all sums, added up. undecided: one int32,
    whether any sum of kept entries was exactly 0."""

    merged: Tensor
    counts: Tensor
    votes: Tensor
    undecided: Tensor


def elect(products: Products, rule: Rule, *, mean: bool, majority: Tensor | None = None) -> Elected:
    """Keep what the rule keeps, times its factor; elect the sign of the sum; average (or add) what has it.

    majority: (modules,) float32, the sign where a sum is exactly 0; without it the result is 0 there.
    """
    merged = products.empty()
    counts, undecided = _elected(products, rule, merged, mean=mean, majority=majority)
    return Elected(merged, counts[:, :2], counts[:, 2], undecided)


def votes(products: Products, rule: Rule) -> Tensor:
    """`elect`'s votes alone, (modules,) int64."""
    return _elected(products, rule, None, mean=False, majority=None)[0][:, 2]


def add(products: Products, rule: Rule) -> Tensor:
    """The sum of what the rule keeps, times its factor, (modules, rows, columns) float32."""
    merged = products.empty()
    _add[(*products.grid, len(merged))](
        products.left, products.right, products.bounds, rule.factor, *rule.kept, merged,
        len(products.slots), *merged.shape[1:], *products.corner, *products.strides,
        DEPTH=products.depth, ROWS=TILE_ROWS, COLUMNS=TILE_COLUMNS, num_warps=8,
    )  # fmt: skip
    turns.between()
    return merged


def magnitudes(products: Products, rule: Rule) -> Tensor:
    """Σ |x| of all entries, and of those that the rule keeps, (modules, n, 2) float64."""
    modules, n = len(products.left), len(products.slots)
    blocks = products.grid[0] * products.grid[1]
    sums = torch.empty(blocks, modules * n, 2, device=products.left.device)
    _magnitudes[(*products.grid, modules * n)](
        products.left, products.right, products.bounds, *rule.kept, sums,
        n, products.left.shape[1], products.right.shape[2], *products.corner, *products.strides,
        DEPTH=products.depth, ROWS=TILE_ROWS, COLUMNS=TILE_COLUMNS, num_warps=4,
    )  # fmt: skip
    turns.between()
    return sums.sum(0, dtype=torch.float64).view(modules, n, 2)


def signs(products: Products, weight: Tensor) -> Tensor:
    """At how many entries weighted tasks differ in sign, and at how many one is not zero, (modules, 2) int64.

    weight: (modules, n) float32, of which the sign alone counts.
    """
    modules, rows = products.left.shape[:2]
    counts = torch.zeros(modules, 2, dtype=torch.int64, device=products.left.device)
    _signs[(*products.grid, modules)](
        products.left, products.right, products.bounds, weight.contiguous(), counts,
        len(products.slots), rows, products.right.shape[2], *products.strides,
        DEPTH=products.depth, ROWS=TILE_ROWS, COLUMNS=TILE_COLUMNS, num_warps=4,
    )  # fmt: skip
    turns.between()
    return counts


def _elected(
    products: Products, rule: Rule, merged: Tensor | None, *, mean: bool, majority: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Entries that are kept, conflicts and votes, (modules, 3) int64, and whether a sum is undecided, one int32."""
    modules, rows = products.left.shape[:2]
    counts = torch.zeros(modules, 3, dtype=torch.int64, device=products.left.device)
    undecided = torch.zeros(1, dtype=torch.int32, device=products.left.device)
    if majority is None and merged is not None:
        majority = merged.new_zeros(modules)
    _elect[(*products.grid, modules)](
        products.left, products.right, products.bounds, rule.weight.contiguous(), rule.factor, *rule.kept,
        None if majority is None else majority.contiguous(), merged, counts, undecided,
        len(products.slots), rows, products.right.shape[2], *products.corner, *products.strides,
        MEAN=mean, DEPTH=products.depth, ROWS=TILE_ROWS, COLUMNS=TILE_COLUMNS, num_warps=4 if merged is None else 8,
    )  # fmt: skip
    turns.between()
    return counts, undecided
