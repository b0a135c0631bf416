# SPDX-License-Identifier: Apache-2.0
"""Filling a LoRA slot in one go.

vLLM fills a slot module by module: hundreds of small copies, launched one by one inside the engine's loop. Here a slot is a
fixed list of buffers (A and B of every slice of every layer), an artifact brings the address, shape and row stride of what
goes into each, and one kernel writes the whole slot, zeros included. Everything but that launch happens beforehand, in the
merging thread. On the CPU the same lists are copied in a loop.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from vllm_merge.adapters.reading import own_pages
from vllm_merge.kernels import turns

COPIED_AT_ONCE = 4 << 20  # bytes that come from outside of a device
TILE = 8192  # elements that one program of the kernel writes


@dataclass(frozen=True)
class SlotBuffer:
    """One stacked buffer of a layer, (slots, 1, rows, columns) or (slots, rows, columns), contiguous.

    module: whose factor `letter` (A or B) goes there, by the model's own name; None: never filled, only cleared.
    """

    layer: str
    module: str | None
    letter: str
    stacked: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of one slot."""
        columns = self.stacked.shape[-1]
        return self.stacked[0].numel() // columns, columns


@dataclass(frozen=True)
class SlotSource:
    """What an artifact brings for one slot: a view for every buffer (None: zeros), and on a GPU their table.

    table: (buffers, 4) int64 of address, rows, columns and row stride in elements.
    """

    views: Sequence[Tensor | None]
    table: Tensor | None


class SlotLayout:
    """The buffers of every slot of a worker, in a fixed order."""

    def __init__(self, buffers: Sequence[SlotBuffer]) -> None:
        self.buffers = list(buffers)
        self.device = self.buffers[0].stacked.device
        if self.device.type == "cuda":
            sizes = [rows * columns for rows, columns in (buffer.shape for buffer in self.buffers)]
            tiles = [(item, start) for item, size in enumerate(sizes) for start in range(0, size, TILE)]
            self._tiles = torch.tensor(tiles, dtype=torch.int64, device=self.device)
            self._targets = torch.tensor(
                [
                    (buffer.stacked.data_ptr(), size, buffer.shape[1])
                    for buffer, size in zip(self.buffers, sizes, strict=True)
                ],
                dtype=torch.int64,
                device=self.device,
            )

    @property
    def nbytes(self) -> int:
        """Of all slots together."""
        return sum(buffer.stacked.nbytes for buffer in self.buffers)

    def source(self, views: Sequence[Tensor | None]) -> SlotSource:
        """Prepare what goes into each buffer; a view has at most the buffer's rows and columns, and columns of stride 1."""
        for buffer, view in zip(self.buffers, views, strict=True):
            if view is None:
                continue
            if view.shape[0] > buffer.shape[0] or view.shape[1] > buffer.shape[1]:
                raise ValueError(f"{buffer.layer} {buffer.letter}: {tuple(view.shape)} does not fit {buffer.shape}")
            if view.stride(1) != 1 or view.dtype != buffer.stacked.dtype or view.device != self.device:
                raise ValueError(
                    f"{buffer.layer} {buffer.letter}: needs rows of {buffer.stacked.dtype} on {self.device}"
                )
        if self.device.type != "cuda":
            return SlotSource(views, None)
        rows = [(v.data_ptr(), v.shape[0], v.shape[1], v.stride(0)) if v is not None else (0, 0, 0, 0) for v in views]
        return SlotSource(views, torch.tensor(rows, dtype=torch.int64, device=self.device))

    def fill(self, slot: int, source: SlotSource) -> None:
        """Write a whole slot, on the current stream."""
        if source.table is None:
            fill_with_torch(self.buffers, slot, source.views)
            return
        from vllm_merge.serving.memory.slot_kernel import fill_slot

        fill_slot(self._tiles, self._targets, source.table, slot, TILE, self.buffers[0].stacked.dtype)


def module_shapes(buffers: Sequence[SlotBuffer]) -> list[tuple[int, int]]:
    """The different (d_out, d_in) of the modules that these are of, in their order."""
    sides: dict[str, dict[str, int]] = {}
    for buffer in buffers:
        if buffer.module is not None:
            rows, columns = buffer.shape
            sides.setdefault(buffer.module, {})[buffer.letter] = columns if buffer.letter == "A" else rows
    return list(dict.fromkeys((side["B"], side["A"]) for side in sides.values() if len(side) == 2))


def fill_with_torch(buffers: Sequence[SlotBuffer], slot: int, views: Sequence[Tensor | None]) -> None:
    """The kernel's plain twin: the path on the CPU, the reference in tests."""
    for buffer, view in zip(buffers, views, strict=True):
        target = buffer.stacked[slot].view(buffer.shape)
        if view is None:
            target.zero_()
            continue
        rows, columns = view.shape
        target[:rows, :columns] = view
        target[rows:].zero_()
        target[:rows, columns:].zero_()


def flat_copy(
    factors: Mapping[str, tuple[Tensor, Tensor]], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """All factors in one storage: (the storage, {module: (A, B)} as views into it).

    One storage is one allocation and one `record_stream`. Every factor begins at a multiple of 16 bytes.
    """
    align = max(1, 16 // dtype.itemsize)
    sizes = [-(-tensor.numel() // align) * align for pair in factors.values() for tensor in pair]
    storage = _storage(sum(sizes), dtype, device)
    views: dict[str, tuple[Tensor, Tensor]] = {}
    at = 0
    places: list[tuple[Tensor, Tensor]] = []
    for module, pair in factors.items():
        mine = []
        for tensor in pair:
            view = storage[at : at + tensor.numel()].view(tensor.shape)
            places.append((view, tensor))
            mine.append(view)
            at += -(-tensor.numel() // align) * align
        views[module] = (mine[0], mine[1])
    for some in _pieces(places):
        torch._foreach_copy_([view for view, _ in some], [tensor for _, tensor in some], non_blocking=True)
        turns.between()
    return storage, views


def _storage(elements: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(elements,), not filled. On the CPU pages of its own: in malloc's heap, artifacts that come and go leave holes between those
    that stay, and hundreds of merges fill a machine with them.
    """
    if device.type != "cpu" or not elements:
        return torch.empty(elements, dtype=dtype, device=device)
    return torch.frombuffer(own_pages(elements * dtype.itemsize), dtype=dtype)


def _pieces(places: Sequence[tuple[Tensor, Tensor]]) -> Iterator[Sequence[tuple[Tensor, Tensor]]]:
    """Copies within a device at once; those from elsewhere in parts, since a GPU copies in turn what comes to it from outside."""
    ends = np.cumsum([tensor.nbytes if tensor.device != view.device else 0 for view, tensor in places])
    parts = ends // COPIED_AT_ONCE
    yield from (places[first:last] for first, last in pairwise([0, *(np.diff(parts).nonzero()[0] + 1), len(places)]))
