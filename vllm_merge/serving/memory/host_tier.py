# SPDX-License-Identifier: Apache-2.0
"""Host memory for artifacts that were evicted from the cache: one block, allocated (on a GPU: pinned) at the start."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from vllm_merge.serving.memory.holes import first_hole
from vllm_merge.serving.memory.packed import Packed, SideStream


@dataclass(frozen=True)
class _Kept:
    start: int
    packed: Packed

    @property
    def stop(self) -> int:
        return self.start + self.packed.nbytes


class HostTier:
    """Least recently used first out. Thread-safe; copies are made under the lock, which vLLM's thread never takes."""

    def __init__(self, budget_bytes: int, device: torch.device) -> None:
        self.budget_bytes = budget_bytes
        self._block = torch.empty(budget_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._stream = SideStream(device)
        self._kept: OrderedDict[str, _Kept] = OrderedDict()  # least recently used first
        self._borrowed: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._evicted = 0

    def put(self, packed: Packed) -> bool:
        """Copy an artifact in, over those that were not used for longest; False if there is no room for it."""
        with self._lock:
            if (kept := self._kept.get(packed.digest)) is not None:
                self._kept.move_to_end(packed.digest)
                if kept.packed.tensors_sha256 is None:  # it was not hashed yet when it came first
                    told = replace(kept.packed, tensors_sha256=packed.tensors_sha256)
                    self._kept[packed.digest] = _Kept(kept.start, told)
                return True
            if packed.nbytes > self.budget_bytes:
                return False
            while (start := self._hole(packed.nbytes)) is None:
                oldest = next((digest for digest in self._kept if not self._borrowed[digest]), None)
                if oldest is None:
                    return False
                del self._kept[oldest]
                self._evicted += 1
            target = self._block[start : start + packed.nbytes]
            self._stream.copy(target, packed.data)
            self._kept[packed.digest] = _Kept(start, packed.at(target))
            return True

    @contextmanager
    def borrow(self, digest: str) -> Iterator[Packed | None]:
        """The artifact, whose bytes stay as they are until the block ends; None if it is not here."""
        with self._lock:
            kept = self._kept.get(digest)
            if kept is not None:
                self._kept.move_to_end(digest)
                self._borrowed[digest] += 1
        try:
            yield kept.packed if kept is not None else None
        finally:
            if kept is not None:
                with self._lock:
                    self._borrowed[digest] -= 1

    def remove(self, digest: str) -> bool:
        """Says whether it was here, and nobody was reading it."""
        with self._lock:
            return not self._borrowed[digest] and self._kept.pop(digest, None) is not None

    def holds(self, digest: str) -> bool:
        return digest in self._kept

    def describe(self) -> dict[str, Any]:
        kept = [entry.packed for entry in list(self._kept.values())]
        rows = [{"digest": p.digest, "name": p.name, "tier": "host", "bytes": p.nbytes} for p in kept]
        return {
            "bytes": sum(p.nbytes for p in kept),
            "budget_bytes": self.budget_bytes,
            "evicted": self._evicted,
            "artifacts": rows,
        }

    def _hole(self, size: int) -> int | None:
        return first_hole(((kept.start, kept.stop) for kept in self._kept.values()), size, self.budget_bytes)
