# SPDX-License-Identifier: Apache-2.0
"""Every variant of the kernels that merges meet, each launched once on next to nothing, so that none is compiled later.

Triton compiles a kernel anew for every dtype, every size that it is told as a constant, and every number or address that is a
multiple of 16 or is not. What a variant depends on is what stands here: how wide adapters and stacks are, in powers of two, and
what a method asks of the entries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from vllm_merge.adapters.arrangement import arranged
from vllm_merge.adapters.factors import Adapter, LoraFactors
from vllm_merge.adapters.stacking import Sources, gather_stacks, group_modules
from vllm_merge.kernels import adam, agreement, descent, orthonormal, powers, products, selection, tridiagonal

Launch = Callable[[], object]

_SIZE = 64  # rows and columns, as divisible as those of models
_GATHERED = (16, 64, 128)  # ranks whose factors are gathered alike, where a thread can read eight elements at once
_ODD = (12, 68)  # and where it cannot
# (adapters, rank of each): those that `descent` takes alike, up to 32 adapters.
_TOGETHER = ((8, 16), (2, 32), (2, 64), (16, 8), (9, 14), (32, 4), (17, 7))


def variants(device: torch.device, widest: int, dtype: torch.dtype) -> Iterator[Launch]:
    """For adapters of a rank up to `widest`, and factors of a result in `dtype`. No call needs a library for products."""
    yield from _gathering(device, widest, dtype)
    depth = 16
    while depth < 2 * max(widest, 9):
        yield from _entries(device, depth)
        depth *= 2
    n = 4
    while n <= tridiagonal.LARGEST:
        yield partial(_decomposed, device, n)
        n *= 2
    for rows in (16, 32, 64, 128):
        for wide in (16, 32, 64):
            if wide == 16 or 2 * wide <= rows:
                yield from _bases(device, rows, wide)
    for adapters, rank in _TOGETHER:
        for power in (1, 2):
            yield partial(_descended, device, adapters, rank, power)
    for rows in (16, 1):
        yield partial(_stepped, device, rows)


def _gathering(device: torch.device, widest: int, dtype: torch.dtype) -> Iterator[Launch]:
    """Stacks in float32, and factors side by side, of adapters of every dtype that is read."""
    for source in (torch.bfloat16, torch.float16, torch.float32):
        for target in {torch.float32, dtype}:
            for ranks in (_GATHERED, _ODD):
                for index, rank in enumerate(ranks):
                    if index == 0 or ranks[index - 1] < widest:
                        yield partial(_gathered, device, rank, source, target)


def _gathered(device: torch.device, rank: int, source: torch.dtype, target: torch.dtype) -> Tensor:
    a, b = (torch.zeros(shape, dtype=source, device=device) for shape in ((rank, _SIZE), (_SIZE, rank)))
    adapter = Adapter("", {"": LoraFactors(a, b)})
    arrangement = arranged(tuple(group_modules([adapter])))
    memory = torch.empty(arrangement.size, dtype=target, device=device)
    return gather_stacks(arrangement, memory, [adapter], Sources(device, 0))


def _entries(device: torch.device, depth: int) -> Iterator[Launch]:
    """Of two tasks of rank `depth`; thresholds by digits and by a guess, and every rule."""
    few = _products(device, depth)
    yield lambda: selection.kth_largest(lambda: [few], torch.full((1, 2), 100, device=device))
    yield partial(_guessed, device, few)
    one, bits = (torch.ones(2, 2, dtype=of, device=device) for of in (torch.float32, torch.int64))
    trimmed = products.Rule(one, least=one)
    masked = products.Rule(one, keys=bits, limits=bits)
    band = products.Rule(one, least=one, most=one)
    for rule in (trimmed, masked, band):
        for mean in (True, False):
            yield partial(products.elect, few, rule, mean=mean)
    for rule in (trimmed, masked):
        yield partial(products.votes, few, rule)
    for frequency in (True, False):
        yield partial(agreement.by_count, few, trimmed, frequency=frequency)
    yield partial(agreement.wanted, few, one, one, 2)
    for rule in (masked, band):
        yield partial(products.add, few, rule)
        yield partial(products.magnitudes, few, rule)


def _guessed(device: torch.device, few: products.Products) -> None:
    """The first pass, and those after it."""
    lowest, highest, shift = torch.zeros(3, 1, 1, 2, dtype=torch.int32, device=device)
    counters = torch.zeros(2, 1, dtype=torch.int32, device=device)
    for above in (torch.zeros(1, 1, 2, dtype=torch.int64, device=device), None):
        selection.count_between(lambda: [few], lowest, highest, shift, above, counters)


def _products(device: torch.device, depth: int) -> products.Products:
    left = torch.ones(2, _SIZE, 2 * depth, device=device)
    right = torch.ones(2, 2 * depth, _SIZE, device=device)
    return products.Products(left, right, (slice(0, depth), slice(depth, 2 * depth)), slice(0, 2))


def _decomposed(device: torch.device, rows: int) -> None:
    one = torch.eye(rows, dtype=torch.float64, device=device).expand(2, rows, rows).clone()
    tridiagonal.ordered(*tridiagonal.diagonalized(one), one, one)


def _bases(device: torch.device, rows: int, wide: int) -> Iterator[Launch]:
    columns = torch.ones(1, rows, wide, dtype=torch.float64, device=device)
    yield partial(orthonormal.orthonormalize, columns)
    yield partial(orthonormal.advance, columns, columns, columns.clone(), columns.new_empty(4, 1))
    if max(rows, wide) <= powers.LARGEST and wide <= powers.WIDEST:
        side = columns.new_ones(1, max(rows, wide), rows)
        yield partial(powers.Powers(side, side, wide, wide, 1), columns, columns)


def _stepped(device: torch.device, rows: int) -> None:
    """Of as many entries as `rows` says: a thread reads two of them at once, or one."""
    start = torch.zeros(1, rows, 3, device=device)
    moved = start.double()
    adam.stepped(moved, moved, moved, moved, start, moved[0, 0, :1], moved.new_ones(1, 7), 0)


def _descended(device: torch.device, adapters: int, rank: int, power: int) -> Tensor:
    slots = [slice(rank * index, rank * (index + 1)) for index in range(adapters)]
    gram = torch.eye(adapters * rank, dtype=torch.float64, device=device)[None].clone()
    return descent.descended(gram, slots, torch.ones_like(gram[:, 0, 0]), 0, power=power, gamma=1.0)
