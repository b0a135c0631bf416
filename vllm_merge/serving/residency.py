# SPDX-License-Identifier: Apache-2.0
"""Which artifacts a worker holds in memory, within one byte budget.

An artifact is counted for as long as any tensor of it is alive: while the store keeps it, and after that while one of
vLLM's registered adapters still refers to it. A lease (of a request in flight) keeps an artifact in the store; the rest is
least recently used. An artifact that left the store but is still alive comes back for free.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
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
    report: Mapping[str, Any]
    seconds: float
    loaded_at: float = field(default_factory=time.time)

    @property
    def rank(self) -> int:
        return max(a.shape[0] for a, _ in self.factors.values())

    @property
    def nbytes(self) -> int:
        return self.storage.nbytes


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

    def insert(self, artifact: ResidentArtifact) -> None:
        """Keep an artifact, evicting what is not leased. Raises OutOfBudget and keeps nothing if that is not enough.

        The caller holds a lease on the digest already if the artifact must stay from the first moment.
        """
        with self._lock:
            needed = artifact.nbytes
            for digest in [d for d in self._kept if not self._leases[d]]:
                if self._bytes + needed <= self.budget_bytes:
                    break
                del self._kept[digest]
            if self._bytes + needed > self.budget_bytes:
                raise OutOfBudget(
                    f"{artifact.name} needs {needed:,} bytes, but {self._bytes:,} of the budget of {self.budget_bytes:,} are "
                    "taken by artifacts that running requests or vLLM's own adapter cache hold. Raise VLLM_MERGE_CACHE_BYTES, "
                    "lower the recipe's rank, or lower --max-cpu-loras."
                )
            self._bytes += needed
            weakref.finalize(artifact, self._freed, needed)
            self._alive[artifact.digest] = artifact
            self._kept[artifact.digest] = artifact

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
