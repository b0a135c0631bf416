# SPDX-License-Identifier: Apache-2.0
"""Exact order statistics of the magnitudes of products that are never stored: what `algebra.selection` does, by kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_merge.kernels import turns
from vllm_merge.kernels.products import ANYWHERE, COUNTS, TILE_COLUMNS, TILE_ROWS, Products, product

_BINS = 256
_DIGITS = (8, 8, 8, 7)  # of the 31 bits of a magnitude, highest first
_SAMPLES = 4096  # entries of every module and task that the first guess is taken from
_ENOUGH = 1 << 16  # of a batch; its modules give fewer where they are many
_STEPS = (0.7548776662466927, 0.5698402909980532)  # to the next sample: 1/x and 1/x² of x³ = x + 1 spread them evenly
_MARGIN = 6  # standard deviations that the guess may be wrong by
_WIDEST = 1 << 20  # bit patterns between the bounds of a guess, each with a counter
_FEW = 1 << 22  # entries of a task up to which no guess is made


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=ANYWHERE)  # type: ignore[untyped-decorator]
def _digits(  # type: ignore[no-untyped-def]
    left, right, bounds, prefix, histogram, first, owners_per_module, low, digit_width, n, rows, columns,
    lm, lr, lk, rm, rk, rc,
    DEPTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """Count one digit of the magnitudes whose higher digits are the prefix."""
    module = (tl.program_id(2) // n).to(tl.int64)
    task = tl.program_id(2) % n
    owner = (first + module) * owners_per_module * n + task  # of one histogram per task, or per module and task
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    entries = product(
        left, right, bounds, module, task, row, column, rows, columns, lm, lr, lk, rm, rk, rc, DEPTH
    )  # fmt: skip
    bits = tl.abs(entries).to(tl.int32, bitcast=True)
    counted = (row[:, None] < rows) & (column[None, :] < columns)
    counted = counted & ((bits >> (low + digit_width)) == tl.load(prefix + owner))
    digit = (bits >> low) & ((1 << digit_width) - 1)
    # What does not count goes to a bin behind those of the digit.
    counts = tl.histogram(tl.ravel(tl.where(counted, digit, BINS)), 2 * BINS)
    bins = tl.arange(0, 2 * BINS)
    tl.atomic_add(
        histogram + owner * BINS + bins, counts.to(tl.int64), mask=(counts > 0) & (bins < BINS), sem="relaxed"
    )


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=ANYWHERE)  # type: ignore[untyped-decorator]
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
    entries = product(
        left, right, bounds, module, task, row, column, rows, columns, lm, lr, lk, rm, rk, rc, DEPTH
    )  # fmt: skip
    bits = tl.abs(entries).to(tl.int32, bitcast=True)
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    least = tl.load(lowest + task)
    most = tl.load(highest + task)
    tl.atomic_add(above + task, tl.sum((inside & (bits > most)).to(tl.int32)).to(tl.int64), sem="relaxed")
    counted = inside & (bits >= least) & (bits <= most)
    tl.atomic_add(counters + task * width + (bits - least), 1, mask=counted, sem="relaxed")


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
            DEPTH=products.depth, ROWS=TILE_ROWS, COLUMNS=TILE_COLUMNS, num_warps=4,
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
                products.modules.start, int(all_modules > 1), low, width, n, rows, columns, *products.strides,
                DEPTH=products.depth, ROWS=TILE_ROWS, COLUMNS=TILE_COLUMNS, BINS=_BINS, num_warps=4,
            )  # fmt: skip
            turns.between()
        digits = 1 << width
        from_top = histogram[..., :digits].flip(-1).cumsum(-1)
        above = (from_top < remaining[..., None]).sum(-1).clamp_max(digits - 1)
        before = from_top.gather(-1, (above - 1).clamp_min(0)[..., None])[..., 0]
        remaining = remaining - torch.where(above > 0, before, 0)
        prefix = (prefix << width) | (digits - 1 - above).int()
    return prefix.view(torch.float32)
