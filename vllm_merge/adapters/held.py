# SPDX-License-Identifier: Apache-2.0
"""Adapters that were made as stacks, and stay in them: a merge that goes on with them takes the stacks as they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

import torch

from vllm_merge.adapters.factors import Adapter, Layout, LazyFactors, LoraFactors, natural_key
from vllm_merge.adapters.stacking import ModuleGroup, Stack


class HeldStacks:
    """Stacks that hold all modules of several adapters, each once. To look up a module's factors makes views of them."""

    def __init__(self, stacks: Sequence[Stack]) -> None:
        self.stacks = stacks

    @cached_property
    def places(self) -> Mapping[str, tuple[int, int]]:
        """By module, in natural order: which stack holds it, and where there."""
        found = {m: (i, at) for i, stack in enumerate(self.stacks) for at, m in enumerate(stack.group.modules)}
        return {module: found[module] for module in sorted(found, key=natural_key)}

    def of(self, adapter: int) -> HeldFactors:
        """The factors of an adapter, by position."""
        return HeldFactors(self, adapter)

    def stack(self, group: ModuleGroup, device: torch.device) -> Stack | None:
        """The factors of a group, as views where one stack has its modules side by side; None where they lie otherwise, or on
        another device."""
        if self.stacks[0].A.device != torch.empty(0, device=device).device:  # "cuda" is one of several
            return None
        runs: list[tuple[int, int, int]] = []  # which stack, from where, to where
        for module in group.modules:
            index, at = self.places[module]
            if runs and runs[-1][0] == index and runs[-1][2] == at:
                runs[-1] = (index, runs[-1][1], at + 1)
            else:
                runs.append((index, at, at + 1))
        if any(self.stacks[index].group.slots != group.slots for index, _, _ in runs):
            return None
        if len(runs) == 1:
            index, first, last = runs[0]
            return Stack(group, self.stacks[index].A[first:last], self.stacks[index].B[first:last])
        a, b = (
            torch.cat([getattr(self.stacks[index], part)[first:last] for index, first, last in runs])
            for part in ("A", "B")
        )
        return Stack(group, a, b)


class HeldFactors(LazyFactors):
    """The factors of one of the adapters, float32 with scaling 1, as views that are made when they are asked for."""

    def __init__(self, held: HeldStacks, adapter: int) -> None:
        self.held, self.adapter = held, adapter
        self._made: dict[str, LoraFactors] = {}

    @cached_property
    def _ranks(self) -> Mapping[str, int]:
        found = {}
        for module, (index, at) in self.held.places.items():
            if rank := self.held.stacks[index].group.ranks[at][self.adapter]:
                found[module] = rank
        return found

    @property
    def layout(self) -> Layout:
        """As that of an adapter with these factors."""
        stacks, places = self.held.stacks, self.held.places
        return Layout((m, stacks[places[m][0]].group.shape, rank, False) for m, rank in self._ranks.items())

    def __getitem__(self, module: str) -> LoraFactors:
        if module not in self._made:
            rank = self._ranks[module]
            index, at = self.held.places[module]
            stack = self.held.stacks[index]
            start = stack.group.slots[self.adapter].start
            own = slice(start, start + rank)
            self._made[module] = LoraFactors(stack.A[at, own], stack.B[at, :, own])
        return self._made[module]

    def __iter__(self) -> Iterator[str]:
        return iter(self._ranks)

    def __len__(self) -> int:
        return len(self._ranks)


def held_stacks(adapters: Sequence[Adapter]) -> HeldStacks | None:
    """The stacks that hold these adapters, all of them in this order; None where there are none."""
    first = adapters[0].factors
    if not isinstance(first, HeldFactors) or len(adapters) != len(first.held.stacks[0].group.slots):
        return None
    for index, adapter in enumerate(adapters):
        mine = adapter.factors
        if not isinstance(mine, HeldFactors) or mine.held is not first.held or mine.adapter != index:
            return None
    return first.held
