# SPDX-License-Identifier: Apache-2.0
"""What is known of some modules on the way through a merge: planned, described, prepared, merged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_merge.adapters.stacking import ModuleGroup, Stack, rejoined
from vllm_merge.algebra.coordinates import Bases, Coordinates, Grams
from vllm_merge.algebra.truncation import Batch as ToCut
from vllm_merge.algebra.truncation import Strips
from vllm_merge.algebra.workspace import ModuleCost


@dataclass(frozen=True, slots=True)
class Batch:
    """Modules that are worked on at once. start: the position of the first among all modules of the merge."""

    group: ModuleGroup
    start: int
    cost: ModuleCost


@dataclass(frozen=True, slots=True)
class Described:
    """What the K × K work on a batch gives, and its parameters: all that is kept of it where its stack is not."""

    batch: Batch
    grams: Grams
    bases: Bases
    entries: Tensor
    parameters: Mapping[str, Tensor]
    in_float32: Mapping[str, Tensor]
    lam: Tensor


@dataclass(frozen=True, slots=True)
class Prepared:
    """A batch on the device, with its parameters: per adapter (modules, n) float64 and in float32, λ (modules,) float64.

    stack: its factors; None where they are made again when they are needed.
    product: in space `factors`, the one task that its method has made of all; the coordinates then are of it.
    """

    batch: Batch
    stack: Stack | None
    grams: Grams
    coordinates: Coordinates
    parameters: Mapping[str, Tensor]
    in_float32: Mapping[str, Tensor]
    lam: Tensor
    product: Stack | None = None

    @classmethod
    def joined(cls, several: Sequence[Prepared], cost: ModuleCost) -> Prepared:
        """Batches whose coordinates have the same rows, columns and slots, as one whose ΔW are these coordinates. cost: of them."""
        spaces = [one.coordinates for one in several]
        group = ModuleGroup.joined([space.group.cored() for space in spaces])
        left, right, entries = (
            rejoined([getattr(space, part) for space in spaces]) for part in ("left", "right", "entries")
        )
        grams = Grams.joined([one.grams for one in several])
        first = several[0]
        return cls(
            Batch(group, first.batch.start, cost),
            None,
            grams,
            Coordinates(group, left, right, None, None, entries),
            {name: rejoined([one.parameters[name] for one in several]) for name in first.parameters},
            {name: rejoined([one.in_float32[name] for one in several]) for name in first.in_float32},
            rejoined([one.lam for one in several]),
        )

    def parameters_of(self, modules: slice, dtype: torch.dtype) -> dict[str, Tensor]:
        """Per-adapter parameters as a method gets them, (modules, n, 1, 1), in float64 or float32."""
        given = self.parameters if dtype == torch.float64 else self.in_float32
        return {name: value[modules, :, None, None] for name, value in given.items()}


@dataclass(frozen=True, slots=True)
class Merged:
    """The merged coordinates of a batch, in strips. short: the smaller of rows and columns; tall: whether that is the columns.

    finite: whether they are, (modules,); None where every pass over the strips looks. noise: the norm under which a result is
    what rounding leaves of tasks that cancel, (modules,). of: the batches they are of, with what is known of each; None where
    that is made again when it is needed.
    """

    strips: Strips
    finite: Tensor | None
    noise: Tensor
    short: int
    tall: bool
    of: Sequence[tuple[Batch, Prepared | None]]

    def to_cut(self) -> ToCut:
        """What `truncate_each` is given."""
        return ToCut(self.strips, torch.cat([batch.group.rank_sums for batch, _ in self.of]))


def runs(batches: Sequence[Batch], fit: Callable[[Sequence[Batch]], bool]) -> list[list[Batch]]:
    """The batches in order, as many together as fit."""
    found: list[list[Batch]] = []
    for batch in batches:
        if found and fit([*found[-1], batch]):
            found[-1].append(batch)
        else:
            found.append([batch])
    return found
