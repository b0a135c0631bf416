# SPDX-License-Identifier: Apache-2.0
"""Groups the modules of several adapters by shape and stacks their factors, so that one batch serves many modules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from vllm_merge.adapters.factors import Adapter, natural_key
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
    shapes: dict[str, tuple[int, int]] = {}
    owners: dict[str, str] = {}
    for adapter in adapters:
        for module, factors in adapter.factors.items():
            if shapes.setdefault(module, factors.shape) != factors.shape:
                raise UserInputError(
                    f"module '{module}': adapter '{adapter.name}' has ΔW of shape {factors.shape}, adapter "
                    f"'{owners[module]}' of {shapes[module]}; adapters to be merged must be of the same base model"
                )
            owners.setdefault(module, adapter.name)
    by_shape: dict[tuple[int, int], list[str]] = {}
    for module in sorted(shapes, key=natural_key):
        by_shape.setdefault(shapes[module], []).append(module)
    return [_group(shape, modules, adapters) for shape, modules in by_shape.items()]


def _group(shape: tuple[int, int], modules: Sequence[str], adapters: Sequence[Adapter]) -> ModuleGroup:
    def rank(adapter: Adapter, module: str) -> int:
        return adapter.factors[module].rank if module in adapter.factors else 0

    ranks = tuple(tuple(rank(adapter, module) for adapter in adapters) for module in modules)
    slots, start = [], 0
    for width in (max(column) for column in zip(*ranks, strict=True)):
        slots.append(slice(start, start + width))
        start += width
    return ModuleGroup(shape, tuple(modules), ranks, tuple(slots))


def stack_group(group: ModuleGroup, adapters: Sequence[Adapter], device: torch.device) -> Stack:
    """Copy the group's factors to the device, as float32."""
    d_out, d_in = group.shape
    count, stacked = len(group.modules), group.stacked_rank
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
