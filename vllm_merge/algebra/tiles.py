# SPDX-License-Identifier: Apache-2.0
"""Tiles: bounded parts of the tasks' entries, made anew at every pass over them.

A tile holds whole modules where they are small, and a strip along the longer side of one module where it is large.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from vllm_merge.adapters.factors import Adapter
from vllm_merge.algebra.coordinates import Coordinates
from vllm_merge.algebra.cores import Cores

if TYPE_CHECKING:
    from vllm_merge.kernels.products import Products


@dataclass(frozen=True, slots=True)
class Part:
    """Which entries of a batch of modules a tile covers."""

    modules: slice
    rows: slice
    cols: slice


@dataclass(frozen=True, slots=True)
class Tile:
    """What a merge method is given: entries of all tasks at a part of some modules.

    space: the space the entries are of. values: (modules, n, rows, cols), float32, in `core` float64; on the meta device
    where the method makes them itself, on the fly (`MethodSpec.on_the_fly`).
    modules: their positions among all modules of the merge. rows, cols: which rows and columns of them these are.
    left, right, slots: values[:, i] = left[:, rows, slots[i]] @ right[:, slots[i], cols]; left (modules, all rows, K)
    and right (modules, K, all columns) are of the whole modules.
    entries: (modules,) int64, how many entries a task has at the whole module.
    parameters: per-adapter parameters by name, each (modules, n, 1, 1) float32.
    """

    space: str
    values: Tensor
    modules: slice
    entries: Tensor
    parameters: Mapping[str, Tensor]
    rows: slice
    cols: slice
    left: Tensor
    right: Tensor
    slots: tuple[slice, ...]

    def apart(self) -> tuple[Tensor, Tensor]:
        """left_i of all rows and right_i of the tile's columns, task by task: (modules, n, all rows, r), (modules, n, r, cols);
        r is the widest slot, and narrower ones end in zeros."""
        widest = max(slot.stop - slot.start for slot in self.slots)
        missing = [widest - (slot.stop - slot.start) for slot in self.slots]
        each = list(zip(self.slots, missing, strict=True))
        left = torch.stack([pad(self.left[:, :, slot], (0, more)) for slot, more in each], 1)
        right = torch.stack([pad(self.right[:, slot, self.cols], (0, 0, 0, more)) for slot, more in each], 1)
        return left, right

    def products(self) -> Products:
        """The tile's entries as what the GPU's kernels make them from."""
        from vllm_merge.kernels.products import Products

        corner = self.rows.start, self.cols.start
        return Products(self.left[:, self.rows], self.right[:, :, self.cols], self.slots, self.modules, corner)


class TilePasses(Protocol):
    """All tiles of all modules, as often as a method's statistics need them. They are the same bytes at every pass."""

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """Per-adapter parameters by name, each (all modules, n) float64."""
        ...

    @property
    def entries(self) -> Tensor:
        """How many entries a task has at each module, (all modules,) int64."""
        ...

    @property
    def on_the_fly(self) -> bool:
        """Whether tiles come without their values, for the method to make."""
        ...

    def tiles(self) -> Iterator[Tile]:
        """Start a new pass."""
        ...


class Passes(TilePasses, Protocol):
    """What the statistics of a method are given."""

    @property
    def adapters(self) -> Sequence[Adapter]:
        """The adapters that are merged, in order."""
        ...

    @property
    def modules(self) -> Sequence[str]:
        """The names of all modules, in the order of their positions."""
        ...

    @property
    def seed(self) -> int:
        """The seed of the merge."""
        ...

    @property
    def lambdas(self) -> Tensor:
        """λ, (all modules,) float64. The engine multiplies what the method returns with it."""
        ...

    def cores(self) -> Iterator[Cores]:
        """Start a new pass over whole modules; for methods that are registered with whole_modules."""
        ...

    def hold(self, nbytes: int) -> None:
        """Count bytes that the statistics keep until the merge ends, for its report."""
        ...


def parts(coordinates: Coordinates, limit: int, *, whole: bool = False) -> Iterator[Part]:
    """Cover the batch by parts of at most `limit` entries over all tasks, and at least one line of one module.

    whole: at least one module, however many entries it has.
    """
    modules, n, rows, cols = coordinates.shape
    size = n * rows * cols
    if whole or size <= limit:
        count = max(1, limit // max(1, size))
        for start in range(0, modules, count):
            yield Part(slice(start, min(start + count, modules)), slice(0, rows), slice(0, cols))
        return
    length = max(rows, cols)
    strip = max(1, limit // (n * min(rows, cols)))
    if strip > _ALIGNED:  # where a GPU's kernels can read several entries at once, in every strip
        strip -= strip % _ALIGNED
    for module in range(modules):
        for start in range(0, length, strip):
            piece = slice(start, min(start + strip, length))
            one = slice(module, module + 1)
            yield Part(one, piece, slice(0, cols)) if rows >= cols else Part(one, slice(0, rows), piece)


def default_tile_entries(device: torch.device, workspace_bytes: int) -> int:
    """Entries per tile: about what the caches hold on the CPU, a share of the workspace on an accelerator."""
    share = max(1, workspace_bytes // (BYTES_PER_ENTRY * 4))
    return min(share, 1 << 20) if device.type == "cpu" else min(share, 1 << 26)


_ALIGNED = 16  # lines
BYTES_PER_ENTRY = 32
"""Bound on a method's live bytes per entry of a tile: the entries in float32 and its temporaries."""
