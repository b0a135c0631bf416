# SPDX-License-Identifier: Apache-2.0
"""Entrywise rules over products left_i @ right_i that are never stored: every entry is made where it is used.

The products are float32 sums in the order of the terms (no TF32), by the same code in every kernel here, so that a
threshold that one kernel finds is met exactly by the entries that another makes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_merge.kernels import turns

_ROWS, _COLUMNS = 64, 64
_BINS = 256
_DIGITS = (8, 8, 8, 7)  # of the 31 bits of a magnitude, highest first
_COUNTS = ["first", "owners_per_module", "width", "n", "rows"]  # whose values are not worth a compilation each
_SAMPLES = 4096  # entries of every module and task that the first guess is taken from
_ENOUGH = 1 << 16  # of a batch; its modules give fewer where they are many
_STEPS = (0.7548776662466927, 0.5698402909980532)  # to the next sample: 1/x and 1/x² of x³ = x + 1 spread them evenly
_MARGIN = 6  # standard deviations that the guess may be wrong by
_WIDEST = 1 << 20  # bit patterns between the bounds of a guess, each with a counter
_FEW = 1 << 22  # entries of a task up to which no guess is made


@dataclass(frozen=True)
class Products:
    """n products per module. left: (modules, rows, K), right: (modules, K, columns), float32; task i has slots[i] of K.

    modules: where these stand among all modules of a merge.
    """

    left: Tensor
    right: Tensor
    slots: Sequence[slice]
    modules: slice

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
        return triton.cdiv(self.left.shape[1], _ROWS), triton.cdiv(self.right.shape[2], _COLUMNS)

    @property
    def strides(self) -> tuple[int, ...]:
        """Of left and right, in elements."""
        return (*self.left.stride(), *self.right.stride())


@triton.jit  # type: ignore[untyped-decorator]
def _product(  # type: ignore[no-untyped-def]
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


@triton.jit(do_not_specialize=_COUNTS)  # type: ignore[untyped-decorator]
def _digits(  # type: ignore[no-untyped-def]
    left, right, bounds, prefix, histogram, first, owners_per_module, n, rows, columns,
    lm, lr, lk, rm, rk, rc,
    LOW: tl.constexpr, WIDTH: tl.constexpr, TOP: tl.constexpr,
    DEPTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """Count one digit of the magnitudes whose higher digits are the prefix."""
    module = (tl.program_id(2) // n).to(tl.int64)
    task = tl.program_id(2) % n
    owner = (first + module) * owners_per_module * n + task  # of one histogram per task, or per module and task
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    entries = _product(
        left, right, bounds, module, task, row, column, rows, columns, lm, lr, lk, rm, rk, rc, DEPTH
    )  # fmt: skip
    bits = tl.abs(entries).to(tl.int32, bitcast=True)
    counted = (row[:, None] < rows) & (column[None, :] < columns)
    if not TOP:
        counted = counted & ((bits >> (LOW + WIDTH)) == tl.load(prefix + owner))
    digit = (bits >> LOW) & ((1 << WIDTH) - 1)
    # What does not count goes to a bin behind those of the digit.
    counts = tl.histogram(tl.ravel(tl.where(counted, digit, BINS)), 2 * BINS)
    bins = tl.arange(0, 2 * BINS)
    tl.atomic_add(
        histogram + owner * BINS + bins, counts.to(tl.int64), mask=(counts > 0) & (bins < BINS), sem="relaxed"
    )


@triton.jit(do_not_specialize=_COUNTS)  # type: ignore[untyped-decorator]
def _between(  # type: ignore[no-untyped-def]
    left, right, bounds, lowest, highest, above, counters, width, n, rows, columns,
    lm, lr, lk, rm, rk, rc,
    DEPTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Count the magnitudes above a task's bounds, and those within them by bit pattern."""
    module = (tl.program_id(2) // n).to(tl.int64)
    task = tl.program_id(2) % n
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    entries = _product(
        left, right, bounds, module, task, row, column, rows, columns, lm, lr, lk, rm, rk, rc, DEPTH
    )  # fmt: skip
    bits = tl.abs(entries).to(tl.int32, bitcast=True)
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    least = tl.load(lowest + task)
    most = tl.load(highest + task)
    tl.atomic_add(above + task, tl.sum((inside & (bits > most)).to(tl.int32)).to(tl.int64), sem="relaxed")
    counted = inside & (bits >= least) & (bits <= most)
    tl.atomic_add(counters + task * width + (bits - least), 1, mask=counted, sem="relaxed")


@triton.jit(do_not_specialize=_COUNTS)  # type: ignore[untyped-decorator]
def _elect(  # type: ignore[no-untyped-def]
    left, right, bounds, threshold, weight, majority, out, counts, undecided, n, rows, columns,
    lm, lr, lk, rm, rk, rc,
    VOTES_ALONE: tl.constexpr, DECIDED: tl.constexpr, MEAN: tl.constexpr,
    DEPTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """TIES from its thresholds: trim, elect, average.

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
        entries = _product(
            left, right, bounds, module, task, row, column, rows, columns, lm, lr, lk, rm, rk, rc, DEPTH
        )  # fmt: skip
        least = tl.load(threshold + module * n + task)
        mine = tl.load(weight + module * n + task)
        kept = tl.where(tl.abs(entries) >= least, entries, 0.0) * mine
        total += kept
        if not VOTES_ALONE:
            above += tl.maximum(kept, 0.0)
            below += tl.minimum(kept, 0.0)
            if MEAN:
                weight_above += tl.where(kept > 0, tl.abs(mine), 0.0)
                weight_below += tl.where(kept < 0, tl.abs(mine), 0.0)
    sign = tl.where(total > 0, 1.0, tl.where(total < 0, -1.0, 0.0))
    votes = tl.sum(sign.to(tl.int32))
    tl.atomic_add(counts + 3 * module + 2, votes.to(tl.int64), sem="relaxed")
    if not VOTES_ALONE:
        kept_by_any = (above > 0) | (below < 0)
        if DECIDED:
            sign = tl.where((total == 0) & kept_by_any, tl.load(majority + module), sign)
        merged = tl.where(sign > 0, above, tl.where(sign < 0, below, 0.0))
        if MEAN:
            divisor = tl.where(sign > 0, weight_above, weight_below)
            merged = merged / tl.where(divisor > 0, divisor, 1.0)
        inside = (row[:, None] < rows) & (column[None, :] < columns)
        place = out + module * rows * columns + row[:, None].to(tl.int64) * columns + column[None, :]
        tl.store(place, merged, mask=inside)
        conflicts = (above > 0) & (below < 0)
        tl.atomic_add(counts + 3 * module, tl.sum(kept_by_any.to(tl.int32)).to(tl.int64), sem="relaxed")
        tl.atomic_add(counts + 3 * module + 1, tl.sum(conflicts.to(tl.int32)).to(tl.int64), sem="relaxed")
        if tl.sum(((total == 0) & kept_by_any).to(tl.int32)) > 0:
            tl.store(undecided, 1)


def kth_largest(passes: Callable[[], Iterable[Products]], counts: Tensor) -> Tensor:
    """What `algebra.selection.kth_largest` gives, for entries that are finite: exactly, over all products of a pass.

    counts: (all modules, n) int64 selects within every module and task, (1, n) within every task over all modules. The
    latter takes one pass where a sample tells well enough where to look.
    """
    if counts.shape[0] == 1:
        found = _kth_largest_by_guess(passes, counts)
        if found is not None:
            return found
    return _kth_largest_by_digits(passes, counts)


def _kth_largest_by_guess(passes: Callable[[], Iterable[Products]], counts: Tensor) -> Tensor | None:
    """None where the sample was too small, or no help."""
    values, weights, n = [], [], counts.shape[1]
    total, square = 0.0, 0.0
    for products in passes():
        found = _sample(products)
        entries, samples = products.left.shape[1] * products.right.shape[2], found.shape[1]
        each = entries * products.left.shape[0] / samples
        values.append(found)
        weights.append(torch.full((samples,), each, dtype=torch.float64, device=counts.device))
        total, square = total + each * samples, square + each**2 * samples
    if total <= _FEW:
        return None
    ordered, order = torch.cat(values, dim=1).sort(dim=1, descending=True)
    ranks = torch.cat(weights)[order].cumsum(1)
    share = counts[0, :, None] / total
    margin = _MARGIN * (share * (1 - share)).clamp_min(0.01).sqrt() * square**0.5
    last = ordered.shape[1] - 1
    first = (ranks < counts[0, :, None] - margin).sum(1, keepdim=True)
    behind = (ranks < counts[0, :, None] + margin).sum(1, keepdim=True)
    bits = ordered.contiguous().view(torch.int32)
    highest = torch.where(first > 0, bits.gather(1, (first - 1).clamp(0, last)), 0x7F7FFFFF)[:, 0].contiguous()
    lowest = torch.where(behind < last, bits.gather(1, behind.clamp(0, last)), 0)[:, 0].contiguous()
    width = int((highest - lowest).amax()) + 1
    if width > _WIDEST:
        return None
    above = torch.zeros(n, dtype=torch.int64, device=counts.device)
    counters = torch.zeros(n, width, dtype=torch.int32, device=counts.device)
    for products in passes():
        modules, rows = products.left.shape[:2]
        _between[(*products.grid, modules * n)](
            products.left, products.right, products.bounds, lowest, highest, above, counters, width,
            n, rows, products.right.shape[2], *products.strides,
            DEPTH=products.depth, ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=4,
        )  # fmt: skip
        turns.between()
    missing = counts[0] - above
    from_top = counters.flip(1).cumsum(1, dtype=torch.int64)
    if bool(((missing < 1) | (missing > from_top[:, -1])).any()):
        return None
    place = width - 1 - (from_top < missing[:, None]).sum(1)
    return (lowest + place.int())[None].view(torch.float32)


def _sample(products: Products) -> Tensor:
    """Magnitudes of entries of every task, (n, samples), the same places of every module."""
    modules, rows = products.left.shape[:2]
    columns = products.right.shape[2]
    samples = min(_SAMPLES, max(_SAMPLES // 8, _ENOUGH // modules))
    index = torch.arange(samples, dtype=torch.float64, device=products.left.device)
    row, column = ((index * step % 1 * size).long() for step, size in zip(_STEPS, (rows, columns), strict=True))
    terms = products.left[:, row] * products.right[:, :, column].mT
    widths = {slot.stop - slot.start for slot in products.slots}
    if len(widths) == 1:  # all at once: a GPU waits for launches here
        values = terms.reshape(modules, samples, len(products.slots), -1).sum(-1)
    else:
        values = torch.stack([terms[:, :, slot].sum(-1) for slot in products.slots], dim=2)
    return values.abs().flatten(0, 1).mT.contiguous()


def _kth_largest_by_digits(passes: Callable[[], Iterable[Products]], counts: Tensor) -> Tensor:
    """A histogram of one digit a pass, from the most significant one."""
    all_modules, n = counts.shape
    prefix = torch.zeros_like(counts, dtype=torch.int32)
    remaining = counts.clone()
    low = sum(_DIGITS)
    for width in _DIGITS:
        low -= width
        histogram = torch.zeros(all_modules, n, _BINS, dtype=torch.int64, device=counts.device)
        for products in passes():
            modules = products.left.shape[0]
            rows, columns = products.left.shape[1], products.right.shape[2]
            _digits[(*products.grid, modules * n)](
                products.left, products.right, products.bounds, prefix, histogram,
                products.modules.start, int(all_modules > 1), n, rows, columns, *products.strides,
                LOW=low, WIDTH=width, TOP=low + width == sum(_DIGITS),
                DEPTH=products.depth, ROWS=_ROWS, COLUMNS=_COLUMNS, BINS=_BINS, num_warps=4,
            )  # fmt: skip
        digits = 1 << width
        from_top = histogram[..., :digits].flip(-1).cumsum(-1)
        above = (from_top < remaining[..., None]).sum(-1).clamp_max(digits - 1)
        before = from_top.gather(-1, (above - 1).clamp_min(0)[..., None])[..., 0]
        remaining = remaining - torch.where(above > 0, before, 0)
        prefix = (prefix << width) | (digits - 1 - above).int()
    return prefix.view(torch.float32)


@dataclass(frozen=True)
class Elected:
    """merged: (modules, rows, columns) float32. counts: (modules, 2) int64, entries that any task keeps, and those of
    them at which tasks differ in sign. votes: (modules,) int64, the signs of all sums, added up. undecided: one int32,
    whether any sum of kept entries was exactly 0."""

    merged: Tensor
    counts: Tensor
    votes: Tensor
    undecided: Tensor


def elect(
    products: Products, threshold: Tensor, weight: Tensor, *, mean: bool, majority: Tensor | None = None
) -> Elected:
    """Keep entries of at least the threshold, times the weight; elect the sign of their sum; average (or add) those of it.

    threshold, weight: (modules, n) float32. majority: (modules,) float32, the sign where a sum is exactly 0; without it
    the result is 0 there.
    """
    shape = (*products.left.shape[:2], products.right.shape[2])
    merged = torch.empty(shape, device=products.left.device)
    counts, undecided = _elected(products, threshold, weight, merged, mean=mean, majority=majority)
    return Elected(merged, counts[:, :2], counts[:, 2], undecided)


def votes(products: Products, threshold: Tensor, weight: Tensor) -> Tensor:
    """`elect`'s votes alone, (modules,) int64."""
    return _elected(products, threshold, weight, None, mean=False, majority=None)[0][:, 2]


def _elected(
    products: Products, threshold: Tensor, weight: Tensor, merged: Tensor | None, *, mean: bool, majority: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Entries that are kept, conflicts and votes, (modules, 3) int64, and whether a sum is undecided, one int32."""
    modules, rows = products.left.shape[:2]
    columns, n, device = products.right.shape[2], len(products.slots), products.left.device
    counts = torch.zeros(modules, 3, dtype=torch.int64, device=device)
    undecided = torch.zeros(1, dtype=torch.int32, device=device)
    _elect[(*products.grid, modules)](
        products.left, products.right, products.bounds, threshold.contiguous(), weight.contiguous(),
        threshold if majority is None else majority.contiguous(), threshold if merged is None else merged,
        counts, undecided, n, rows, columns, *products.strides,
        VOTES_ALONE=merged is None, DECIDED=majority is not None, MEAN=mean,
        DEPTH=products.depth, ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=4 if merged is None else 8,
    )  # fmt: skip
    turns.between()
    return counts, undecided
