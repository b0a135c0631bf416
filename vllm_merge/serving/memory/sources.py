# SPDX-License-Identifier: Apache-2.0
"""The adapters that a worker merges, kept in host memory from one merge to the next.

An adapter is read whole into memory that was allocated (on a GPU: pinned) at the start, hashed there once, and then is a
view of it; so a merge of adapters that were merged before reads no file, and what goes to the GPU goes in one copy each.
Used by the merging thread alone.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_merge.adapters.factors import Adapter
from vllm_merge.adapters.peft import ReadAdapter, parse_adapter, read_bytes, size_of
from vllm_merge.adapters.reading import host_memory
from vllm_merge.recipe.plan import Plan, PlannedAdapter
from vllm_merge.serving.memory.holes import first_hole

READERS = 4  # threads that read and hash files, none of which needs the interpreter much
REST_SECONDS = 0.005  # after an adapter was parsed, for whoever waits for the interpreter


@dataclass
class _Kept:
    start: int
    stop: int
    adapter: Adapter


class SourceCache:
    """Least recently used first out."""

    def __init__(self, budget_bytes: int, device: torch.device) -> None:
        self._block = torch.empty(budget_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._kept: OrderedDict[str, _Kept] = OrderedDict()  # by content hash, least recently used first
        self._at_hand: dict[str, Adapter] = {}  # of the plan that is merged
        self.budget_bytes = budget_bytes
        self.lookups: Counter[str] = Counter()  # adapters that plans asked for, by where they were: memory or file
        self._readers = _readers(min(READERS, os.cpu_count() or 1))

    @property
    def bytes(self) -> int:
        """Of all that is kept."""
        return sum(kept.stop - kept.start for kept in list(self._kept.values()))

    def fetch(self, plan: Plan, going_on: Callable[[], None]) -> None:
        """Have all adapters of a plan in memory. going_on() is called between two, and may raise to stop.

        Raises UserInputError for an adapter that cannot be read or has changed since it was planned.
        """
        wanted = {planned.content_hash for planned in plan.adapters.values()}
        self._at_hand = {key: kept.adapter for key, kept in self._kept.items() if key in wanted}
        for key in self._at_hand:
            self._kept.move_to_end(key)
        cold = {p.content_hash: p for p in plan.adapters.values() if p.content_hash not in self._at_hand}
        self.lookups.update(memory=len(self._at_hand), file=len(cold))
        sizes = {key: size_of(planned.path) for key, planned in cold.items()}
        places: dict[str, int | None] = {}
        reads: dict[str, Future[ReadAdapter]] = {}
        try:
            for key, size in sizes.items():
                places[key] = self._place(key, size, wanted)
            for key, size in sizes.items():
                reads[key] = self._readers.submit(self._read, cold[key], places[key], size)
            for key, read in reads.items():
                # On the GPU the merge itself finds what is not finite.
                adapter = parse_adapter(read.result(), check_values=not self._block.is_pinned())
                self._at_hand[key] = adapter
                if (place := places[key]) is not None and read.result().data.numel() == sizes[key]:
                    self._kept[key] = _Kept(place, place + sizes[key], adapter)
                time.sleep(REST_SECONDS)
                going_on()
        finally:
            for read in reads.values():
                read.cancel()
            for read in reads.values():
                if not read.cancelled():
                    read.exception()  # nothing may write into the block once this returns
            for key in [key for key, kept in self._kept.items() if kept.adapter is _NOTHING]:
                del self._kept[key]

    def load(self, planned: PlannedAdapter) -> Adapter:
        """An adapter of the plan that was fetched, under its name there."""
        return self._at_hand[planned.content_hash].named(planned.name)

    def done(self) -> None:
        """The plan is merged; what was not kept is let go."""
        self._at_hand = {}

    def _read(self, planned: PlannedAdapter, place: int | None, expected: int) -> ReadAdapter:
        def memory(size: int, first: int) -> Tensor:
            if place is None or size != expected:
                return host_memory(size, first)
            return self._block[place : place + size]

        return read_bytes(planned.path, planned.name, expected_hash=planned.content_hash, memory=memory)

    def _place(self, key: str, size: int, wanted: set[str]) -> int | None:
        """Where `size` bytes are free, after dropping what no plan at hand wants; None if there is no such place."""
        while (start := self._hole(size)) is None:
            oldest = next((kept for kept in self._kept if kept not in wanted), None)
            if oldest is None:
                return None
            del self._kept[oldest]
        self._kept[key] = _Kept(start, start + size, _NOTHING)
        return start

    def _hole(self, size: int) -> int | None:
        return first_hole(((kept.start, kept.stop) for kept in self._kept.values()), size, self._block.numel())


def _readers(count: int) -> ThreadPoolExecutor:
    """Threads that run already: where one cannot be started, that is known before something is to be read."""
    pool = ThreadPoolExecutor(count, "vllm-merge-read")
    all_run = threading.Barrier(count)
    list(pool.map(lambda _: all_run.wait(), range(count)))
    return pool


_NOTHING = Adapter("", {})
