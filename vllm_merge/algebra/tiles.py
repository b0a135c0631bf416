# SPDX-License-Identifier: Apache-2.0
"""Tiles: bounded parts of the tasks' entries, made anew at every pass over them.

A tile holds whole modules where they are small, and a strip along the longer side of one module where it is large.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vllm_merge.algebra.coordinates import Coordinates


@dataclass(frozen=True, slots=True)
class Part:
    """Which entries of a batch of modules a tile covers."""

    modules: slice
    rows: slice
    cols: slice


@dataclass(frozen=True, slots=True)
class Tile:
    """What a merge method is given: entries of all tasks at a part of some modules.

    space: the space the entries are of. values: (modules, n, rows, cols), float32, in `core` float64.
    modules: their positions among all modules of the merge.
    entries: (modules,) int64, how many entries a task has at the whole module.
    parameters: per-adapter parameters by name, each (modules, n, 1, 1) float32.
    """

    space: str
    values: Tensor
    modules: slice
    entries: Tensor
    parameters: Mapping[str, Tensor]


class Passes(Protocol):
    """All tiles of all modules, as often as a method's statistics need them. They are the same bytes at every pass."""

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """Per-adapter parameters by name, each (all modules, n) float64."""
        ...

    @property
    def entries(self) -> Tensor:
        """How many entries a task has at each module, (all modules,) int64."""
        ...

    def tiles(self) -> Iterator[Tile]:
        """Start a new pass."""
        ...


def parts(coordinates: Coordinates, limit: int) -> Iterator[Part]:
    """Cover the batch by parts of at most `limit` entries over all tasks, and at least one line of one module."""
    modules, n, rows, cols = coordinates.shape
    whole = n * rows * cols
    if whole <= limit:
        count = max(1, limit // max(1, whole))
        for start in range(0, modules, count):
            yield Part(slice(start, min(start + count, modules)), slice(0, rows), slice(0, cols))
        return
    length = max(rows, cols)
    strip = max(1, limit // (n * min(rows, cols)))
    for module in range(modules):
        for start in range(0, length, strip):
            piece = slice(start, min(start + strip, length))
            one = slice(module, module + 1)
            yield Part(one, piece, slice(0, cols)) if rows >= cols else Part(one, slice(0, rows), piece)


def default_tile_entries(device: torch.device, workspace_bytes: int) -> int:
    """Entries per tile: about what the caches hold on the CPU, a share of the workspace on an accelerator."""
    share = max(1, workspace_bytes // (BYTES_PER_ENTRY * 4))
    return min(share, 1 << 20) if device.type == "cpu" else min(share, 1 << 26)


BYTES_PER_ENTRY = 32
"""Bound on a method's live bytes per entry of a tile: the entries in float32 and its temporaries."""
