# SPDX-License-Identifier: Apache-2.0
"""Stacks of many modules in one run of memory: where each lies, and the factors of a module as views of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

from torch import Tensor

from vllm_merge.adapters.factors import LoraFactors, natural_key

if TYPE_CHECKING:
    from vllm_merge.adapters.stacking import ModuleGroup

_ALIGNED = 64  # elements


@dataclass(frozen=True, eq=False)
class Arrangement:
    """Of each group, where its A (modules, K, d_in) and its B (modules, d_out, K) begin in one run of `size` elements."""

    groups: tuple[ModuleGroup, ...]
    firsts: tuple[tuple[int, int], ...]
    size: int

    def stack(self, memory: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """A and B of a group, as views of the memory (size,)."""
        group, (a, b) = self.groups[index], self.firsts[index]
        (d_out, d_in), k, count = group.shape, group.stacked_rank, len(group.modules)
        return (
            memory.as_strided((count, k, d_in), (k * d_in, d_in, 1), a),
            memory.as_strided((count, d_out, k), (d_out * k, k, 1), b),
        )

    @cached_property
    def group_of(self) -> Mapping[str, int]:
        """By module, in natural order: the position of its group."""
        found = {module: index for index, group in enumerate(self.groups) for module in group.modules}
        return {module: found[module] for module in sorted(found, key=natural_key)}


@lru_cache(maxsize=128)
def arranged(groups: tuple[ModuleGroup, ...]) -> Arrangement:
    """The stacks of these groups, one after the other."""
    firsts, end = [], 0
    for group in groups:
        (d_out, d_in), terms = group.shape, len(group.modules) * group.stacked_rank
        a = end
        b = _up(a + terms * d_in)
        end = _up(b + terms * d_out)
        firsts.append((a, b))
    return Arrangement(groups, tuple(firsts), end)


def _up(elements: int) -> int:
    return -(-elements // _ALIGNED) * _ALIGNED


class FactorViews(Mapping[str, LoraFactors]):
    """The factors of modules in one run of memory, in natural order, as views that are made when they are asked for.

    To make those of hundreds of modules takes as long as a GPU takes to fill the memory.
    """

    def __init__(self, memory: Tensor, arrangement: Arrangement) -> None:
        self._memory, self._arrangement = memory, arrangement
        self._made: dict[str, LoraFactors] = {}

    def __getitem__(self, module: str) -> LoraFactors:
        if module not in self._made:
            index = self._arrangement.group_of[module]
            a, b = self._arrangement.stack(self._memory, index)
            views = map(LoraFactors, a.unbind(), b.unbind())
            self._made.update(zip(self._arrangement.groups[index].modules, views, strict=True))
        return self._made[module]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrangement.group_of)

    def __len__(self) -> int:
        return len(self._arrangement.group_of)
