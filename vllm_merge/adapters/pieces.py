# SPDX-License-Identifier: Apache-2.0
"""What a GPU is told to gather stacks: of every factor of every adapter where it lies, and where in the stacks it goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING
from weakref import ReferenceType, ref

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm_merge.adapters.places import ADDRESS, DTYPE, DTYPES, ITEM_SIZES, STRIDE, Places

if TYPE_CHECKING:
    from vllm_merge.adapters.arrangement import Arrangement
    from vllm_merge.adapters.stacking import ModuleGroup, Sources

_AT_ONCE = 3 << 27  # elements of one launch: about half a millisecond of a large GPU, which others may wait for
ALIGNED = 8  # elements, that a thread of the kernel can read or write at once


@dataclass(frozen=True, eq=False, slots=True)
class Pieces:
    """One piece for each factor: of every module, A and B, of every adapter, in this order (modules, 2, n).

    numbers: (8, pieces) int64: the source's address, rows, columns and row stride (0 where there is none); rows and columns
    to write; the first element in the stacks' memory, and the stride there. scaling, weight_of: (pieces,), what a piece is
    multiplied with, and where its weight stands among those of all modules (modules, n): of A 1, and −1. All are sorted by
    the sources' dtype. launches: dtype, first piece and the one after the last, of each. aligned: see `all_aligned`. widest:
    columns of the widest slot; largest: elements of the largest piece. on_device: the table where it was needed before.
    """

    numbers: NDArray[np.int64]
    scaling: NDArray[np.float64]
    weight_of: NDArray[np.int64]
    launches: tuple[tuple[torch.dtype, int, int], ...]
    aligned: bool
    widest: int
    largest: int
    on_device: dict[torch.device, Tensor] = field(default_factory=dict)

    @property
    def count(self) -> int:
        return len(self.numbers[0])

    def table(self, device: torch.device) -> Tensor:
        """The numbers, then `weight_of`, then `scaling` (its bits), flat int64, on the device."""
        found = self.on_device.get(device)
        if found is None:  # waits: another stream may use it next
            every = np.concatenate((self.numbers.ravel(), self.weight_of, self.scaling.view(np.int64)))
            found = self.on_device[device] = torch.from_numpy(every).to(device)
        return found


def pieces_of(arrangement: Arrangement, places: Sequence[Places], sources: Sources) -> Pieces:
    """The pieces of adapters, whose factors may lie anywhere: those on the host are first copied to the GPU."""
    if any(mine.any_on_host for mine in places):
        return _pieces(arrangement, places, sources)
    key = arrangement, tuple(ref(mine, _forget) for mine in places)
    found = _known.pop(key, None) or _pieces(arrangement, places, None)
    _known[key] = found  # behind those that were not asked for since
    for oldest in list(_known)[:-_KEPT]:
        _known.pop(oldest, None)
    return found


_KEPT = 128
_known: dict[tuple[Arrangement, tuple[ReferenceType[Places], ...]], Pieces] = {}
"""Of the merges that are made again and again, of adapters that are on a GPU. What is kept there goes with the adapters."""


def _forget(gone: ReferenceType[Places]) -> None:
    for key in list(_known):
        if any(mine is gone for mine in key[1]):
            _known.pop(key, None)


def _pieces(arrangement: Arrangement, places: Sequence[Places], sources: Sources | None) -> Pieces:
    groups, firsts = arrangement.groups, arrangement.firsts
    blocks = [_block(group, *first, places, sources) for group, first in zip(groups, firsts, strict=True)]
    numbers, dtypes = (np.concatenate([block[part] for block in blocks], axis=-3) for part in (0, 1))
    scaling = np.concatenate([block[2] for block in blocks])
    weight_of: NDArray[np.int64] = np.full(scaling.shape, -1, dtype=np.int64)
    weight_of[:, 1] = np.arange(weight_of[:, 1].size).reshape(weight_of[:, 1].shape)
    numbers, dtypes, scaling, weight_of = numbers.reshape(8, -1), dtypes.ravel(), scaling.ravel(), weight_of.ravel()
    if (dtypes != dtypes[0]).any():
        order = dtypes.argsort(kind="stable")
        numbers, dtypes, scaling, weight_of = numbers[:, order], dtypes[order], scaling[order], weight_of[order]
    elements = numbers[4] * numbers[5]
    parts = elements.cumsum() // _AT_ONCE
    cuts = np.flatnonzero((np.diff(dtypes) != 0) | (np.diff(parts) != 0)) + 1
    return Pieces(
        numbers,
        scaling,
        weight_of,
        tuple((DTYPES[dtypes[first]], first, last) for first, last in pairwise([0, *cuts.tolist(), len(dtypes)])),
        all_aligned(numbers, ITEM_SIZES[dtypes]),
        max(slot.stop - slot.start for group in groups for slot in group.slots),
        int(elements.max()),
    )


def all_aligned(numbers: NDArray[np.int64], item_sizes: NDArray[np.int64]) -> bool:
    """Whether all addresses (in elements), columns, first elements and strides are multiples of ALIGNED."""
    bits = np.bitwise_or.reduce(numbers[[2, 3, 5, 6, 7]], axis=None) | np.bitwise_or.reduce(numbers[0] // item_sizes)
    return bool(bits % ALIGNED == 0)


def _block(
    group: ModuleGroup, first_a: int, first_b: int, places: Sequence[Places], sources: Sources | None
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Of one group: (8, modules, 2, n) numbers, (modules, 2, n) dtypes and scaling."""
    (d_out, d_in), k, count = group.shape, group.stacked_rank, len(group.modules)
    numbers = np.empty((8, count, 2, len(places)), dtype=np.int64)
    dtypes = np.empty((count, 2, len(places)), dtype=np.int64)
    scaling = np.ones((count, 2, len(places)))
    for index, mine in enumerate(places):
        at = mine.positions(group.modules)
        found = mine.numbers[at] if sources is None else sources.numbers(mine, at)
        numbers[: STRIDE + 1, :, :, index] = np.moveaxis(found[:, :, ADDRESS : STRIDE + 1], -1, 0)
        dtypes[:, :, index] = found[:, :, DTYPE]
        scaling[:, 1, index] = mine.scaling[at]
    start, width = np.array([(slot.start, slot.stop - slot.start) for slot in group.slots]).T  # (n,) each
    each = np.arange(count)[:, None] * k
    into_a = (width, d_in, first_a + (each + start) * d_in, d_in)
    into_b = (d_out, width, first_b + each * d_out + start, k)
    for side, written in enumerate((into_a, into_b)):
        for number, value in zip(numbers[STRIDE + 1 :], written, strict=True):
            number[:, side] = value
    return numbers, dtypes, scaling
