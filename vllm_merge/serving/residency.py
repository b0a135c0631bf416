# SPDX-License-Identifier: Apache-2.0
"""Which artifacts a worker holds in memory, within one byte budget.

An artifact is counted for as long as any tensor of it is alive: while the store keeps it, and after that while something
(an adapter that vLLM registered, where vLLM fills the slots itself) still refers to it; such a one comes back for free. A
lease (of a request in flight) keeps an artifact in the store; the rest is least recently used.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vllm_merge.errors import MergeError
from vllm_merge.serving.slots import SlotSource


class OutOfBudget(MergeError):
    """The artifact does not fit beside what is leased."""


@dataclass(eq=False)
class ResidentArtifact:
    """A merged (or plain) adapter ready for a slot: {module: (A (r, d_in), B (d_out, r))}, scaling 1, on the worker's device.

    storage: the one tensor that all factors are views of. source: what a slot is filled from; None leaves that to vLLM.
    """

    digest: str
    name: str
    storage: Tensor
    factors: Mapping[str, tuple[Tensor, Tensor]]
    source: SlotSource | None
    tensors_sha256: str
    seconds: float

    @property
    def rank(self) -> int:
        return max(a.shape[0] for a, _ in self.factors.values())

    @property
    def nbytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self.storages)

    @property
    def storages(self) -> list[Tensor]:
        """A tensor of every storage that belongs to the artifact: the factors', the table, slices that were copied."""
        more = [] if self.source is None else [self.source.table, *self.source.views]
        tensors = [self.storage, *(t for t in more if t is not None)]
        return list({t.untyped_storage().data_ptr(): t for t in tensors}.values())


class ArtifactStore:
    """Thread-safe: the engine's thread, the merging thread and the control thread all use it."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self._lock = threading.RLock()
        self._kept: OrderedDict[str, ResidentArtifact] = OrderedDict()  # least recently used first
        self._alive: weakref.WeakValueDictionary[str, ResidentArtifact] = weakref.WeakValueDictionary()
        self._leases: Counter[str] = Counter()
        self._bytes = 0

    def get(self, digest: str) -> ResidentArtifact | None:
        """The artifact if it is alive, as most recently used and back in the store."""
        with self._lock:
            artifact = self._alive.get(digest)
            if artifact is not None:
                self._kept[digest] = artifact
                self._kept.move_to_end(digest)
            return artifact

    def peek(self, digest: str) -> ResidentArtifact | None:
        """The artifact if it is alive; nothing changes."""
        with self._lock:
            return self._alive.get(digest)

    def insert(self, artifact: ResidentArtifact) -> None:
        """Keep an artifact, making room for it. Raises what `make_room` raises, and keeps nothing then.

        The caller holds a lease on the digest already if the artifact must stay from the first moment.
        """
        with self._lock:
            self.make_room(artifact.name, artifact.nbytes)
            needed = artifact.nbytes
            self._bytes += needed
            weakref.finalize(artifact, self._freed, needed)
            self._alive[artifact.digest] = artifact
            self._kept[artifact.digest] = artifact

    def make_room(self, name: str, needed: int) -> None:
        """Evict what is not leased, least recently used first, until `needed` bytes fit; nothing is evicted in vain.

        Raises OutOfBudget if what is leased leaves too little, MergeError if the budget is too small at any time.
        """
        with self._lock:
            cure = "Raise VLLM_MERGE_CACHE_BYTES or lower the recipe's rank."
            if needed > self.budget_bytes:
                raise MergeError(f"{name} needs {needed:,} bytes; the budget is {self.budget_bytes:,}. {cure}")
            victims, held = [], self._bytes + needed
            for digest in self._kept:
                if held <= self.budget_bytes:
                    break
                if not self._leases[digest]:
                    victims.append(digest)
                    held -= self._kept[digest].nbytes
            if held > self.budget_bytes:
                raise OutOfBudget(
                    f"{name} needs {needed:,} bytes, but running requests hold too much of the budget of "
                    f"{self.budget_bytes:,}. {cure}"
                )
            for digest in victims:
                del self._kept[digest]

    def _freed(self, nbytes: int) -> None:
        with self._lock:
            self._bytes -= nbytes

    def lease(self, digest: str) -> None:
        with self._lock:
            self._leases[digest] += 1

    def release(self, digest: str) -> None:
        with self._lock:
            self._leases[digest] -= 1
            if self._leases[digest] <= 0:
                del self._leases[digest]

    def evict(self, digest: str) -> bool:
        """Drop an artifact from the store unless it is leased; says whether it was dropped."""
        with self._lock:
            if self._leases[digest]:
                return False
            return self._kept.pop(digest, None) is not None

    def describe(self) -> dict[str, Any]:
        """What is held, for people: bytes, budget, and a row per artifact (kept: in the store; else only vLLM refers to it)."""
        with self._lock:
            rows = [
                {
                    "digest": digest,
                    "name": artifact.name,
                    "rank": artifact.rank,
                    "bytes": artifact.nbytes,
                    "leases": self._leases[digest],
                    "kept": digest in self._kept,
                    "seconds": artifact.seconds,
                    "tensors_sha256": artifact.tensors_sha256,
                }
                for digest, artifact in sorted(self._alive.items())
            ]
            return {"bytes": self._bytes, "budget_bytes": self.budget_bytes, "artifacts": rows}
