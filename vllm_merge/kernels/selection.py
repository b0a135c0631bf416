# SPDX-License-Identifier: Apache-2.0
"""Exact order statistics of the magnitudes of products that are never stored: what `algebra.selection` does, by kernels."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_merge.kernels import turns
from vllm_merge.kernels.products import ANYWHERE, COUNTS, TILE_COLUMNS, TILE_ROWS, Products, product

_BINS = 256
_DIGITS = (8, 8, 8, 7)  # of the 31 bits of a magnitude, highest first
_SAMPLES = 4096  # entries of every module and task that a guess is taken from
_ENOUGH = 1 << 16  # of all modules of a batch where the guess is of the whole model, and at once where it is not
_STEPS = (0.7548776662466927, 0.5698402909980532)  # to the next sample: 1/x and 1/x² of x³ = x + 1 spread them evenly
_MARGIN = 6  # standard deviations that the guess may be wrong by
_FEW = 1 << 22  # entries of a task up to which no guess is made
_COUNTERS = 1 << 24  # between the bounds of all guesses
_WIDEST = 20  # bits of the number of counters of one guess
_AT_ONCE = 1 << 18  # counters that are added up one by one, of all guesses
_LONG = 128  # terms of a product that more threads are needed for, or they run out of registers
_LARGEST = 0x7F7FFFFF  # the bit pattern of the largest number


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
    left, right, bounds, lowest, highest, shift, above, counters,
    first, owners_per_module, owners, guesses, width, n, rows, columns, lm, lr, lk, rm, rk, rc,
    DEPTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Count the magnitudes above the bounds of every guess, and those within them by the leading bits of their distance."""
    module = (tl.program_id(2) // n).to(tl.int64)
    task = tl.program_id(2) % n
    owner = (first + module) * owners_per_module * n + task
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    entries = product(
        left, right, bounds, module, task, row, column, rows, columns, lm, lr, lk, rm, rk, rc, DEPTH
    )  # fmt: skip
    bits = tl.abs(entries).to(tl.int32, bitcast=True)
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    for guess in range(guesses):
        place = guess * owners + owner
        least = tl.load(lowest + place)
        most = tl.load(highest + place)
        if above is not None:
            tl.atomic_add(above + place, tl.sum((inside & (bits > most)).to(tl.int32)).to(tl.int64), sem="relaxed")
        counted = inside & (bits >= least) & (bits <= most)
        counter = (bits - least) >> tl.load(shift + place)
        tl.atomic_add(counters + place * width + counter, 1, mask=counted, sem="relaxed")


def kth_largest(passes: Callable[[], Iterable[Products]], counts: Tensor) -> Tensor:
    """What `algebra.selection.kth_largest` gives, for entries that are finite: exactly, over all products of a pass.

    counts: (…, all modules, n) int64 selects within every module and task, (…, 1, n) within every task over all modules.
    Where samples tell well enough where to look, it takes one pass or two for all of them together.
    """
    several = counts.reshape(-1, *counts.shape[-2:])
    found = _kth_largest_by_guess(passes, several)
    if found is None:
        found = torch.stack([_kth_largest_by_digits(passes, one) for one in several])
    return found.view(counts.shape)


def _kth_largest_by_guess(passes: Callable[[], Iterable[Products]], counts: Tensor) -> Tensor | None:
    """None where the samples were too small, or no help. counts: (guesses, all modules or 1, n)."""
    if 2 * counts.numel() > _COUNTERS:
        return None  # a counter for each halves no range
    guessed = _guess(passes, counts)
    if guessed is None:
        return None
    lowest, highest = guessed
    # Zeros, which may be many, are not counted: what is sought beyond all that is not zero is one of them.
    beyond = down_to_zero = lowest == 0
    lowest, highest = lowest.clamp_min(1), highest.clamp_min(1)
    most = min(_WIDEST, (_COUNTERS // counts.numel()).bit_length() - 1)
    above: Tensor | None = torch.zeros(counts.shape, dtype=torch.int64, device=counts.device)
    missing = counts
    while True:
        spread = highest - lowest
        shift = (torch.frexp(spread.double()).exponent - most).clamp_min(0)
        width = int((spread >> shift).amax()) + 1
        block = min(width, max(1, _AT_ONCE // counts.numel()))
        blocks = -(-width // block)
        counters = torch.zeros(counts.numel(), blocks * block, dtype=torch.int32, device=counts.device)
        count_between(passes, lowest, highest, shift, above, counters)
        counters = counters.view(*counts.shape, blocks, block)
        of_blocks = counters.sum(-1)
        if above is not None:
            missing = counts - above
            beyond = missing > of_blocks.sum(-1)
            if bool(((missing < 1) | (beyond & ~down_to_zero)).any()):
                return None
            above = None  # known from now on
        where, missing = _from_top(of_blocks, missing)
        inside = counters.gather(-2, where[..., None, None].expand(*counts.shape, 1, block))[..., 0, :]
        place, missing = _from_top(inside, missing)
        lowest = lowest + ((where * block + place).int() << shift)
        if not bool(shift.any()):
            return torch.where(beyond, 0, lowest).view(torch.float32)
        highest = torch.minimum(highest, lowest + (1 << shift) - 1)


def count_between(
    passes: Callable[[], Iterable[Products]],
    lowest: Tensor,
    highest: Tensor,
    shift: Tensor,
    above: Tensor | None,
    counters: Tensor,
) -> None:
    """Count the magnitudes of a pass whose bit patterns are from `lowest` to `highest`, and those `above`.

    Both, and shift, are (guesses, all modules or 1, n) int32, above is int64. counters: (their number, width) int32, one for
    the patterns that have the same (pattern − lowest) >> shift. All are contiguous.
    """
    guesses, all_modules, n = lowest.shape
    for products in passes():
        modules, rows = products.left.shape[:2]
        _between[(*products.grid, modules * n)](
            products.left, products.right, products.bounds, lowest, highest, shift, above, counters,
            products.modules.start, int(all_modules > 1), all_modules * n, guesses, counters.shape[1],
            n, rows, products.right.shape[2], *products.strides,
            DEPTH=products.depth, ROWS=TILE_ROWS, COLUMNS=TILE_COLUMNS, num_warps=4 if products.depth < _LONG else 8,
        )  # fmt: skip
        turns.between()


def _guess(passes: Callable[[], Iterable[Products]], counts: Tensor) -> tuple[Tensor, Tensor] | None:
    """The bit patterns between which what is sought lies, most likely, each in the shape of counts; None for few entries."""
    by_module, total = counts.shape[1] > 1, 0
    samples: dict[int, list[tuple[Tensor, Tensor]]] = defaultdict(list)  # of the modules from each one on, or of all
    for products in passes():
        modules, entries = len(products.left), products.left.shape[1] * products.right.shape[2]
        total += modules * entries
        at_once = min(_SAMPLES, max(_SAMPLES // 8, _ENOUGH // modules))
        found = _sample(products, _SAMPLES if by_module else at_once, at_once)
        each = entries / found.shape[2]
        if not by_module:
            found = found.transpose(0, 1).flatten(1)[None]
        weight = torch.full(found.shape[2:], each, dtype=torch.float64, device=counts.device)
        samples[products.modules.start if by_module else 0].append((found, weight))
    if total <= _FEW:
        return None
    lowest, highest = torch.empty(2, *counts.shape, dtype=torch.int32, device=counts.device)
    for start, parts in samples.items():
        values, weights = (torch.cat(part, dim=-1) for part in zip(*parts, strict=True))
        mine = slice(start, start + len(values))
        lowest[:, mine], highest[:, mine] = _bounds(values, weights, counts[:, mine])
    return lowest, highest


def _bounds(values: Tensor, weights: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Bit patterns that the counts-th largest lie between, (guesses, rows, n) int32 as counts. values: (rows, n, samples), each
    of which stands for `weights` (samples,) entries."""
    ordered, order = values.sort(dim=-1, descending=True)
    ranks = weights[order].cumsum(-1)
    bits = ordered.contiguous().view(torch.int32)
    last = bits.shape[-1] - 1
    wanted = counts.movedim(0, -1).double()
    share = wanted / weights.sum()
    margin = _MARGIN * (share * (1 - share)).clamp_min(0.01).sqrt() * weights.square().sum().sqrt()
    first = torch.searchsorted(ranks, (wanted - margin).contiguous())
    behind = torch.searchsorted(ranks, (wanted + margin).contiguous())
    highest = torch.where(first > 0, bits.gather(-1, (first - 1).clamp(0, last)), _LARGEST)
    lowest = torch.where(behind < last, bits.gather(-1, behind.clamp(0, last)), 0)
    return lowest.movedim(-1, 0), highest.movedim(-1, 0)


def _sample(products: Products, samples: int, at_once: int) -> Tensor:
    """Magnitudes of entries of every task, (modules, n, samples), the same places of every module."""
    sizes = products.left.shape[1], products.right.shape[2]
    index = torch.arange(samples, dtype=torch.float64, device=products.left.device)
    row, column = ((index * step % 1 * size).long() for step, size in zip(_STEPS, sizes, strict=True))
    places = zip(torch.split(row, at_once), torch.split(column, at_once), strict=True)
    return torch.cat([_magnitudes_at(products, *place) for place in places], dim=2)


def _magnitudes_at(products: Products, row: Tensor, column: Tensor) -> Tensor:
    """Of every module and task, (modules, n, places)."""
    terms = products.left[:, row] * products.right[:, :, column].mT
    widths = {slot.stop - slot.start for slot in products.slots}
    if len(widths) == 1:  # all at once: a GPU waits for launches here
        values = terms.reshape(*terms.shape[:2], len(products.slots), -1).sum(-1)
    else:
        values = torch.stack([terms[:, :, slot].sum(-1) for slot in products.slots], dim=2)
    return values.abs().mT.contiguous()


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
        digit, remaining = _from_top(histogram[..., : 1 << width], remaining)
        prefix = (prefix << width) | digit.int()
    return prefix.view(torch.float32)


def _from_top(counts: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The bin (…,) that holds the wanted-th entry, from the last bin down, and its number there; the first where none does.

    counts: (…, bins), how many entries each has.
    """
    from_top = counts.flip(-1).cumsum(-1, dtype=torch.int64)
    above = (from_top < wanted[..., None]).sum(-1).clamp_max(counts.shape[-1] - 1)
    before = from_top.gather(-1, (above - 1).clamp_min(0)[..., None])[..., 0]
    return counts.shape[-1] - 1 - above, wanted - torch.where(above > 0, before, 0)
