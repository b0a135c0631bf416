# SPDX-License-Identifier: Apache-2.0
"""Groups the modules of several adapters by shape and stacks their factors, so that one batch serves many modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from vllm_merge.adapters.factors import Adapter, Layout, natural_key
from vllm_merge.adapters.places import ABSENT, DTYPES, Places
from vllm_merge.errors import UserInputError


@dataclass(frozen=True, slots=True)
class ModuleGroup:
    """Modules of one shape (d_out, d_in). ranks[m][i] is adapter i's rank at module m, 0 where it lacks the module.

    Adapter i's rank-one terms stand at slots[i] of the K = Σ_i max_m ranks[m][i] stacked ones; shorter ones are padded
    with zeros.
    """

    shape: tuple[int, int]
    modules: tuple[str, ...]
    ranks: tuple[tuple[int, ...], ...]
    slots: tuple[slice, ...]

    @property
    def stacked_rank(self) -> int:
        """K, the number of stacked rank-one terms."""
        return sum(slot.stop - slot.start for slot in self.slots)

    def by_ranks(self) -> Iterator[ModuleGroup]:
        """The group in pieces of modules whose adapters have the same ranks, so that no term is padding."""
        same: dict[tuple[int, ...], list[str]] = {}
        for module, ranks in zip(self.modules, self.ranks, strict=True):
            same.setdefault(ranks, []).append(module)
        for ranks, modules in same.items():
            yield ModuleGroup(self.shape, tuple(modules), (ranks,) * len(modules), _slots(ranks))

    def only(self, adapters: Sequence[int]) -> ModuleGroup:
        """The group with some of its adapters, by position; its modules have the same ranks (`by_ranks`)."""
        ranks = tuple(self.ranks[0][index] for index in adapters)
        return ModuleGroup(self.shape, self.modules, (ranks,) * len(self.modules), _slots(ranks))

    def of(self, modules: Sequence[int]) -> ModuleGroup:
        """The group with some of its modules, by position."""
        names, ranks = tuple(self.modules[m] for m in modules), tuple(self.ranks[m] for m in modules)
        return ModuleGroup(self.shape, names, ranks, self.slots)

    def batches(self, modules: int) -> Iterator[ModuleGroup]:
        """The group in pieces of at most this many modules, all with the group's slots."""
        for start in range(0, len(self.modules), modules):
            piece = slice(start, start + modules)
            yield ModuleGroup(self.shape, self.modules[piece], self.ranks[piece], self.slots)


@dataclass(frozen=True, slots=True)
class Stack:
    """The stacked factors of a group, scaling folded into B. A: (modules, K, d_in), B: (modules, d_out, K), float32."""

    group: ModuleGroup
    A: Tensor
    B: Tensor


def group_modules(adapters: Sequence[Adapter]) -> list[ModuleGroup]:
    """All modules that any adapter has, grouped by shape, in natural order.

    Raises UserInputError where adapters disagree on the shape of a module.
    """
    return list(_grouped(tuple(adapter.layout for adapter in adapters), tuple(adapter.name for adapter in adapters)))


@lru_cache(maxsize=16)  # of the merges that are made again and again, of the same adapters
def _grouped(layouts: tuple[Layout, ...], names: tuple[str, ...]) -> tuple[ModuleGroup, ...]:
    shapes: dict[str, tuple[int, int]] = {}
    owners: dict[str, str] = {}
    ranks: list[dict[str, int]] = []
    for name, layout in zip(names, layouts, strict=True):
        ranks.append({module: rank for module, _, rank in layout})
        for module, shape, _ in layout:
            if shapes.setdefault(module, shape) != shape:
                raise UserInputError(
                    f"module '{module}': adapter '{name}' has ΔW of shape {shape}, adapter "
                    f"'{owners[module]}' of {shapes[module]}; adapters to be merged must be of the same base model"
                )
            owners.setdefault(module, name)
    by_shape: dict[tuple[int, int], list[str]] = {}
    for module in sorted(shapes, key=natural_key):
        by_shape.setdefault(shapes[module], []).append(module)

    def group(shape: tuple[int, int], modules: Sequence[str]) -> ModuleGroup:
        found = tuple(tuple(mine.get(module, 0) for mine in ranks) for module in modules)
        return ModuleGroup(shape, tuple(modules), found, _slots([max(column) for column in zip(*found, strict=True)]))

    return tuple(group(shape, modules) for shape, modules in by_shape.items())


def _slots(widths: Sequence[int]) -> tuple[slice, ...]:
    ends = list(accumulate(widths))
    return tuple(slice(end - width, end) for end, width in zip(ends, widths, strict=True))


def stack_group(
    group: ModuleGroup, adapters: Sequence[Adapter], device: torch.device, sources: Sources | None = None
) -> Stack:
    """Copy the group's factors to the device, as float32. sources: of the whole merge, where there are several passes."""
    d_out, d_in = group.shape
    count, stacked = len(group.modules), group.stacked_rank
    if device.type == "cuda":
        a = torch.empty(count, stacked, d_in, device=device)
        b = torch.empty(count, d_out, stacked, device=device)
        fill_on_gpu(group, adapters, sources or Sources(device, 0), a, b)
        return Stack(group, a, b)
    a = torch.zeros(count, stacked, d_in, device=device)
    b = torch.zeros(count, d_out, stacked, device=device)
    scale = torch.zeros(count, stacked)
    for index, (adapter, slot) in enumerate(zip(adapters, group.slots, strict=True)):
        present = [m for m, ranks in enumerate(group.ranks) if ranks[index]]
        if not present:
            continue
        width = slot.stop - slot.start
        factors = [adapter.factors[group.modules[m]] for m in present]
        for m, module in zip(present, factors, strict=True):
            scale[m, slot] = module.scaling
        _place(a[:, slot], present, [pad(f.A, (0, 0, 0, width - f.rank)) for f in factors])
        _place(b[:, :, slot], present, [pad(f.B, (0, width - f.rank)) for f in factors])
    return Stack(group, a, b.mul_(scale.to(device)[:, None, :]))


def _place(target: Tensor, present: Sequence[int], matrices: Sequence[Tensor]) -> None:
    values = torch.stack(list(matrices))
    if len(present) == target.shape[0]:
        target.copy_(values)
    else:
        target[torch.tensor(present, device=target.device)] = values.to(target.device, target.dtype)


class Sources:
    """Where the factors of adapters lie on a GPU; those in host memory are copied there.

    An adapter that lies in one run of bytes (a file that was read whole, into pinned memory at best) is copied in one go
    and kept, as long as `keep_bytes` allow, so that passes over a merge's modules copy it once. The rest is copied factor
    by factor, for the batch at hand.
    """

    CHUNK_BYTES = 4 << 20  # copied at once: small copies of others go in between

    def __init__(
        self,
        device: torch.device,
        keep_bytes: int,
        adapters: Sequence[Adapter] = (),
        pause: Callable[[], object] = lambda: None,
    ) -> None:
        """pause(): called between pieces of work."""
        self._device = device
        self.pause = pause
        self._passing: list[Tensor] = []
        self._kept: list[Tensor] = []
        # First and last address of a run on the host, and how far it moved.
        self._moved: list[tuple[int, int, int]] = []
        room = keep_bytes
        runs = [run for adapter in adapters if (run := _run_of_bytes(adapter)) is not None]
        for run in {(run.data_ptr(), run.numel()): run for run in runs}.values():  # one may have several names
            if run.numel() <= room:
                room -= run.numel()
                self._kept.append(self._copied(run))
                first = run.data_ptr()
                self._moved.append((first, first + run.numel(), self._kept[-1].data_ptr() - first))

    def _copied(self, run: Tensor) -> Tensor:
        there = torch.empty_like(run, device=self._device)
        chunks = (torch.split(whole, self.CHUNK_BYTES) for whole in (there, run))
        for mine, its in zip(*chunks, strict=True):
            mine.copy_(its, non_blocking=True)
            torch.cuda.current_stream(self._device).synchronize()
        self.pause()
        return there

    def begin_batch(self) -> None:
        """Forget what was copied for the batch before."""
        self._passing = []

    def addresses(
        self, places: Places, at: NDArray[np.int64], side: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Addresses on the device, and elements from row to row, of the A (side 0) or B (side 1) at these positions."""
        address, stride = places.address[at, side], places.stride[at, side]
        elsewhere = places.on_host[at, side] & (at != ABSENT)
        if not elsewhere.any():
            return address, stride
        moved = address.copy()
        for first, last, distance in self._moved:
            inside = elsewhere & (first <= address) & (address < last)
            moved[inside] += distance
            elsewhere &= ~inside
        for index in elsewhere.nonzero()[0]:
            there = places.factors[at[index]][side].to(self._device, non_blocking=True).contiguous()
            self._passing.append(there)
            moved[index], stride[index] = there.data_ptr(), there.stride(0)
        return moved, stride


def _run_of_bytes(adapter: Adapter) -> Tensor | None:
    """The bytes from an adapter's first factor in host memory to its last, if there is little else in between."""
    places = adapter.places
    if not len(places.factors) or not places.on_host.all() or (places.stride != places.columns).any():
        return None
    storage = places.factors[0][0].untyped_storage()
    sizes = np.array([dtype.itemsize for dtype in DTYPES])[places.dtype]
    first = int(places.address.min())
    last = int((places.address + places.rows * places.columns * sizes).max())
    if not storage.data_ptr() <= first <= last <= storage.data_ptr() + storage.nbytes():
        return None
    if last - first > 2 * adapter.nbytes:
        return None
    whole = torch.empty(0, dtype=torch.uint8)
    return whole.set_(storage, first - storage.data_ptr(), (last - first,))  # type: ignore[call-overload,no-any-return]


def side_by_side(
    group: ModuleGroup,
    adapters: Sequence[Adapter],
    shares: Tensor,
    device: torch.device,
    dtype: torch.dtype,
    sources: Sources | None,
) -> tuple[Tensor, Tensor, bool]:
    """A = [A_1; …; A_n] (modules, K, d_in) and B = [c_1 B_1, …, c_n B_n] (modules, d_out, K), and whether they are finite.

    shares: c, (modules, n) float64, on the CPU; the scaling is folded into B.
    """
    (d_out, d_in), count = group.shape, len(group.modules)
    if device.type != "cuda":
        stack = stack_group(group, adapters, device)
        columns = [shares[:, index, None].expand(-1, slot.stop - slot.start) for index, slot in enumerate(group.slots)]
        a, b = stack.A.to(dtype), (stack.B * torch.cat(columns, dim=1)[:, None, :].to(device, torch.float32)).to(dtype)
        return a, b, bool(a.isfinite().all() & b.isfinite().all())
    a = torch.empty(count, group.stacked_rank, d_in, dtype=dtype, device=device)
    b = torch.empty(count, d_out, group.stacked_rank, dtype=dtype, device=device)
    overflow = fill_on_gpu(group, adapters, sources or Sources(device, 0), a, b, shares.numpy())
    return a, b, not bool(overflow)


def fill_on_gpu(
    group: ModuleGroup,
    adapters: Sequence[Adapter],
    sources: Sources,
    a: Tensor,
    b: Tensor,
    weights: NDArray[np.float64] | None = None,
) -> Tensor:
    """Write the stacked A (modules, K, d_in) and B (modules, d_out, K), of any dtype, B times scaling and weights[m, i].

    Returns one int32, not 0 where a value is not finite in the dtype of the stack.
    """
    from vllm_merge.kernels.gather import gather

    sources.begin_batch()
    (d_out, d_in), stacked, count = group.shape, group.stacked_rank, len(group.modules)
    each = np.arange(count)
    tables: dict[tuple[int, int], list[NDArray[np.int64]]] = {}  # by side and dtype
    scales: dict[tuple[int, int], list[NDArray[np.float64]]] = {}
    for index, (adapter, slot) in enumerate(zip(adapters, group.slots, strict=True)):
        sources.pause()
        width = slot.stop - slot.start
        if not width:
            continue
        places = adapter.places
        at = places.positions(group.modules)
        there = at != ABSENT
        shares = places.scaling[at] * (1.0 if weights is None else weights[:, index])
        for side, (rows, columns, first, scale) in enumerate(
            (
                (width, d_in, (each * stacked + slot.start) * d_in, np.ones(count)),
                (d_out, width, each * d_out * stacked + slot.start, shares),
            )
        ):
            address, stride = sources.addresses(places, at, side)
            found = [address, places.rows[at, side], places.columns[at, side], stride]
            write = [np.full(count, rows), np.full(count, columns), first]
            table = np.stack([*(np.where(there, column, 0) for column in found), *write], axis=1)
            dtypes = places.dtype[at, side]
            for dtype in set(dtypes.tolist()):
                mine = dtypes == dtype
                tables.setdefault((side, dtype), []).append(table[mine])
                scales.setdefault((side, dtype), []).append(np.where(there, scale, 0.0)[mine])
    overflow = torch.zeros(1, dtype=torch.int32, device=a.device)
    widest = max(slot.stop - slot.start for slot in group.slots)
    for (side, dtype), pieces in tables.items():
        out, stride_out, size = ((a, d_in, widest * d_in), (b, stacked, widest * d_out))[side]
        numbers = np.append(np.concatenate(pieces).ravel(), stride_out)
        factors = np.concatenate(scales[side, dtype]).astype(np.float32)
        gather(
            torch.from_numpy(numbers).to(a.device, non_blocking=True),
            torch.from_numpy(factors).to(a.device, non_blocking=True),
            out,
            overflow,
            size,
            DTYPES[dtype],
        )
    return overflow
