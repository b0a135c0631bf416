# SPDX-License-Identifier: Apache-2.0
"""Groups the modules of several adapters by shape and stacks their factors, so that one batch serves many modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from vllm_merge.adapters.arrangement import Arrangement, arranged
from vllm_merge.adapters.factors import Adapter, Layout, natural_key
from vllm_merge.adapters.places import ADDRESS, ON_HOST, STRIDE, Places
from vllm_merge.errors import UserInputError


@dataclass(frozen=True, eq=False)
class ModuleGroup:
    """Modules of one shape (d_out, d_in). ranks[m][i] is adapter i's rank at module m, 0 where it lacks the module.

    Adapter i's rank-one terms stand at slots[i] of the K = Σ_i max_m ranks[m][i] stacked ones; shorter ones are padded
    with zeros.
    """

    shape: tuple[int, int]
    modules: tuple[str, ...]
    ranks: tuple[tuple[int, ...], ...]
    slots: tuple[slice, ...]

    @cached_property
    def stacked_rank(self) -> int:
        """K, the number of stacked rank-one terms."""
        return sum(slot.stop - slot.start for slot in self.slots)

    @cached_property
    def rank_table(self) -> Tensor:
        """`ranks`, (modules, n) int64, on the CPU."""
        return torch.tensor(self.ranks, dtype=torch.int64).reshape(len(self.modules), -1)

    @cached_property
    def rank_sums(self) -> Tensor:
        """Σ r_i of each module, (modules,) int64, on the CPU."""
        return torch.tensor([sum(ranks) for ranks in self.ranks], dtype=torch.int64)

    def by_ranks(self) -> Sequence[ModuleGroup]:
        """The group in pieces of modules whose adapters have the same ranks, so that no term is padding."""
        return self._by_ranks

    @cached_property
    def _by_ranks(self) -> tuple[ModuleGroup, ...]:
        same: dict[tuple[int, ...], list[str]] = {}
        for module, ranks in zip(self.modules, self.ranks, strict=True):
            same.setdefault(ranks, []).append(module)
        return tuple(
            ModuleGroup(self.shape, tuple(modules), (ranks,) * len(modules), _slots(ranks))
            for ranks, modules in same.items()
        )

    def only(self, adapters: Sequence[int]) -> ModuleGroup:
        """The group with some of its adapters, by position; its modules have the same ranks (`by_ranks`)."""
        if list(adapters) == list(range(len(self.slots))):
            return self
        ranks = tuple(self.ranks[0][index] for index in adapters)
        return ModuleGroup(self.shape, self.modules, (ranks,) * len(self.modules), _slots(ranks))

    def of(self, modules: Sequence[int]) -> ModuleGroup:
        """The group with some of its modules, by position."""
        names, ranks = tuple(self.modules[m] for m in modules), tuple(self.ranks[m] for m in modules)
        return ModuleGroup(self.shape, names, ranks, self.slots)

    def cored(self) -> ModuleGroup:
        """The group as that of its tasks' coordinates in `core`, which have at most K rows and columns."""
        return self._cored

    @cached_property
    def _cored(self) -> ModuleGroup:
        k, (d_out, d_in) = self.stacked_rank, self.shape
        return ModuleGroup((min(k, d_out), min(k, d_in)), self.modules, self.ranks, self.slots)

    @classmethod
    def joined(cls, groups: Sequence[ModuleGroup]) -> ModuleGroup:
        """The modules of groups that have one shape and the same slots; the same one at every call."""
        return _joined(tuple(groups))

    def batches(self, modules: int) -> Sequence[ModuleGroup]:
        """The group in pieces of at most this many modules, all with the group's slots; the same ones at every call."""
        return _batches(self, modules) if modules < len(self.modules) else (self,)

    def part(self, modules: slice) -> ModuleGroup:
        """The group with some of its modules."""
        return ModuleGroup(self.shape, self.modules[modules], self.ranks[modules], self.slots)


@lru_cache(maxsize=16)
def _joined(groups: tuple[ModuleGroup, ...]) -> ModuleGroup:
    modules = tuple(module for group in groups for module in group.modules)
    ranks = tuple(row for group in groups for row in group.ranks)
    return ModuleGroup(groups[0].shape, modules, ranks, groups[0].slots)


@lru_cache(maxsize=16)  # of the merges that are made again and again: what is known of a group is known of its pieces
def _batches(group: ModuleGroup, modules: int) -> tuple[ModuleGroup, ...]:
    return tuple(group.part(slice(start, start + modules)) for start in range(0, len(group.modules), modules))


@dataclass(frozen=True, slots=True)
class Stack:
    """The stacked factors of a group, scaling folded into B. A: (modules, K, d_in), B: (modules, d_out, K), float32."""

    group: ModuleGroup
    A: Tensor
    B: Tensor

    def of(self, modules: slice) -> Stack:
        """Of some modules of the group."""
        return Stack(self.group.part(modules), self.A[modules], self.B[modules])


def rejoined(parts: Sequence[Tensor]) -> Tensor:
    """The rows of all parts: a view where these are slices of one tensor, one behind the other, else a copy."""
    first, behind = parts[0], parts[0].data_ptr()
    for part in parts:
        if part.data_ptr() != behind or part.stride() != first.stride() or part.shape[1:] != first.shape[1:]:
            return torch.cat(list(parts))
        if part.untyped_storage().data_ptr() != first.untyped_storage().data_ptr() or part.dtype != first.dtype:
            return torch.cat(list(parts))
        behind += part.shape[0] * part.stride(0) * part.itemsize
    return first.as_strided((sum(len(part) for part in parts), *first.shape[1:]), first.stride())


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
        ranks.append({module: rank for module, _, rank, _ in layout})
        for module, shape, _, _ in layout:
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
        arrangement = arranged((group,))
        memory = torch.empty(arrangement.size, device=device)
        gather_stacks(arrangement, memory, adapters, sources or Sources(device, 0))
        return Stack(group, *arrangement.stack(memory, 0))
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
        runs = [run for adapter in adapters if (run := adapter.places.run) is not None]
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

    def numbers(self, places: Places, at: NDArray[np.int64]) -> NDArray[np.int64]:
        """`places.numbers` at these positions, with addresses on the device, where all are then."""
        numbers = places.numbers[at]
        address, elsewhere = numbers[..., ADDRESS], numbers[..., ON_HOST] != 0
        given = address.copy()
        for first, last, distance in self._moved:
            inside = elsewhere & (first <= given) & (given < last)
            address[inside] += distance
            elsewhere &= ~inside
        for index, side in zip(*elsewhere.nonzero(), strict=True):
            there = places.factors[at[index]][side].to(self._device, non_blocking=True).contiguous()
            self._passing.append(there)
            numbers[index, side, [ADDRESS, STRIDE]] = there.data_ptr(), there.stride(0)
        return numbers


def side_by_side(
    arrangement: Arrangement,
    memory: Tensor,
    adapters: Sequence[Adapter],
    shares: Tensor,
    sources: Sources | None,
) -> Tensor:
    """Write A = [A_1; …; A_n] and B = [c_1 B_1, …, c_n B_n] of every group to memory (size,), in its dtype.

    shares: c, (all modules, n) or of all alike (1, n), float64, on the CPU; the scaling is folded into B. Returns a number
    on the device, not 0 where a value is not finite.
    """
    if memory.device.type == "cuda":
        return gather_stacks(arrangement, memory, adapters, sources or Sources(memory.device, 0), shares)
    overflow = torch.zeros((), dtype=torch.bool)
    shares, start = shares.expand(sum(len(group.modules) for group in arrangement.groups), -1), 0
    for index, group in enumerate(arrangement.groups):
        a, b = arrangement.stack(memory, index)
        stack = stack_group(group, adapters, memory.device)
        mine = shares[start : start + len(group.modules)].float()
        start += len(group.modules)
        columns = [mine[:, i, None].expand(-1, slot.stop - slot.start) for i, slot in enumerate(group.slots)]
        a.copy_(stack.A)
        b.copy_(stack.B * torch.cat(columns, dim=1)[:, None, :])
        overflow |= ~(a.isfinite().all() & b.isfinite().all())
    return overflow


def gather_stacks(
    arrangement: Arrangement,
    memory: Tensor,
    adapters: Sequence[Adapter],
    sources: Sources,
    weights: Tensor | None = None,
) -> Tensor:
    """Write the stacks of every group to memory (size,) on a GPU, in its dtype, B times scaling and weights.

    weights: (all modules, n) or of all alike (1, n), float64, on the CPU; 1 without. Returns a number on the GPU, not 0 where
    a value is not finite.
    """
    from vllm_merge.adapters.pieces import pieces_of
    from vllm_merge.kernels.gather import gather

    sources.begin_batch()
    pieces = pieces_of(arrangement, [adapter.places for adapter in adapters], sources)
    told = [1.0] if weights is None else weights.flatten().tolist()
    weights_and_flag = torch.tensor([*told, 0.0], dtype=torch.float64).to(memory.device, non_blocking=True)
    gather(pieces.table(memory.device), weights_and_flag, memory, pieces, sources.pause)
    return weights_and_flag[-1]
