# SPDX-License-Identifier: Apache-2.0
"""Which artifacts a worker holds in memory, within one byte budget.

An artifact is counted for as long as any tensor of it is alive: while the store keeps it, and after that while something
still refers to it; such a one comes back for free. So is what vLLM itself keeps on the device beside our artifacts. A lease
(of a request in flight) or a pin keeps an artifact in the store; the rest is least recently used, and goes to the tiers below.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from vllm_merge.errors import MergeError
from vllm_merge.serving.memory.slots import SlotSource

LETTING_GO_SECONDS = 1.0  # how long an evicted artifact may be in some thread's hands before others are evicted too


class OutOfBudget(MergeError):
    """The artifact does not fit beside what is leased or pinned."""


@dataclass(eq=False)
class ResidentArtifact:
    """A merged (or plain) adapter ready for a slot: {module: (A (r, d_in), B (d_out, r))}, scaling 1, on the worker's device.

    embeddings: which of the modules are embeddings, where d_in is tokens.
    storage: the one tensor that all factors are views of. source: what a slot is filled from; None leaves that to vLLM.
    origin: what it came from, `merge`, or the tier that it was in: `host` or `disk`. steps: what its merge did when.
    report: of its merge (MergeReport.to_dict); None for an adapter by itself. used: when it was last wanted, s since 1970.
    """

    digest: str
    name: str
    storage: Tensor
    factors: Mapping[str, tuple[Tensor, Tensor]]
    source: SlotSource | None
    tensors_sha256: str | None
    seconds: float
    origin: str = "merge"
    steps: list[dict[str, Any]] = field(default_factory=list)
    embeddings: frozenset[str] = frozenset()
    report: Mapping[str, Any] | None = None
    used: float = field(default_factory=time.time)

    @property
    def rank(self) -> int:
        return max(a.shape[0] for a, _ in self.factors.values())

    @property
    def nbytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self.storages)

    @cached_property
    def storages(self) -> list[Tensor]:
        """A tensor of every storage that belongs to the artifact: the factors', the table, slices that were copied.

        Found once, when the store counts its bytes: vLLM's thread asks for them inside a step.
        """
        more = [] if self.source is None else [self.source.table, *self.source.views]
        tensors = [self.storage, *(t for t in more if t is not None)]
        return list({t.untyped_storage().data_ptr(): t for t in tensors}.values())


class ArtifactStore:
    """Thread-safe: the engine's thread, the merging thread and the control thread all use it.

    demote(artifact) is called for what is evicted, before its memory is given back, in the thread that needs the room.
    others() is how many bytes of the budget are taken by what vLLM keeps for itself.
    """

    def __init__(
        self,
        budget_bytes: int,
        demote: Callable[[ResidentArtifact], None] = lambda artifact: None,
        others: Callable[[], int] = lambda: 0,
    ) -> None:
        self.budget_bytes = budget_bytes
        self.admission = threading.Lock()
        """Held from `make_room` until `insert`, so that two threads do not fill the same room."""
        self._demote, self._others = demote, others
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._kept: OrderedDict[str, ResidentArtifact] = OrderedDict()  # least recently used first
        self._alive: weakref.WeakValueDictionary[str, ResidentArtifact] = weakref.WeakValueDictionary()
        self._leases: Counter[str] = Counter()
        self._pins: set[str] = set()
        self._bytes = 0
        self._largest = 0  # bytes of the largest artifact so far
        self.evicted = 0  # artifacts so far

    def get(self, digest: str) -> ResidentArtifact | None:
        """The artifact if it is alive, as most recently used and back in the store."""
        with self._lock:
            artifact = self._alive.get(digest)
            if artifact is not None:
                artifact.used = time.time()
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
        self.make_room(artifact.name, artifact.nbytes)
        with self._lock:
            needed = artifact.nbytes
            self._bytes += needed
            self._largest = max(self._largest, needed)
            weakref.finalize(artifact, self._freed, needed)
            self._alive[artifact.digest] = artifact
            self._kept[artifact.digest] = artifact

    def make_room(self, name: str, needed: int) -> None:
        """Evict what is not leased or pinned, least recently used first, until `needed` bytes fit; nothing in vain.

        Raises OutOfBudget if what is held leaves too little, MergeError if the budget is too small at any time.
        """
        try:
            victims = self._victims(name, needed)
        except OutOfBudget:
            self._let_go(needed)
            victims = self._victims(name, needed)
        while victims:
            for artifact in victims:
                self._demote(artifact)
            del artifact, victims
            self._let_go(needed)
            victims = self._victims(name, needed)  # more, where something keeps one of those

    def _let_go(self, needed: int) -> None:
        """Wait a little for threads that are about to drop what was evicted."""
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self._bytes + self._others() + needed <= self.budget_bytes
                    or self._bytes == sum(artifact.nbytes for artifact in self._kept.values())
                ),
                LETTING_GO_SECONDS,
            )

    def _victims(self, name: str, needed: int) -> list[ResidentArtifact]:
        """Take out of the store what has to go for `needed` bytes."""
        with self._lock:
            cure = "Raise VLLM_MERGE_CACHE_BYTES or lower the recipe's rank."
            if needed > self.budget_bytes:
                raise MergeError(f"{name} needs {needed:,} bytes; the budget is {self.budget_bytes:,}. {cure}")
            victims, held = [], self._bytes + self._others() + needed
            for digest, artifact in self._kept.items():
                if held <= self.budget_bytes:
                    break
                if not self._is_held(digest):
                    victims.append(digest)
                    held -= artifact.nbytes
            if held > self.budget_bytes:
                pins = ", and what is pinned," if self._pins else ""
                raise OutOfBudget(
                    f"{name} needs {needed:,} bytes, but running requests{pins} hold too much of the budget of "
                    f"{self.budget_bytes:,}. {cure}"
                )
            self.evicted += len(victims)
            return [self._kept.pop(digest) for digest in victims]

    def _is_held(self, digest: str) -> bool:
        return digest in self._pins or self._leases[digest] > 0

    def _freed(self, nbytes: int) -> None:
        with self._changed:
            self._bytes -= nbytes
            self._changed.notify_all()

    def lease(self, digest: str) -> None:
        with self._lock:
            self._leases[digest] += 1

    def release(self, digest: str) -> None:
        with self._lock:
            self._leases[digest] -= 1
            if (artifact := self._alive.get(digest)) is not None:
                artifact.used = time.time()
            if self._leases[digest] <= 0:
                del self._leases[digest]

    def evict(self, digest: str, *, demote: bool = True) -> bool:
        """Drop an artifact from the store unless it is leased or pinned; says whether it was dropped.

        Without `demote` the tiers below are not offered it.
        """
        with self._lock:
            artifact = None if self._is_held(digest) else self._kept.pop(digest, None)
            self.evicted += artifact is not None
        if artifact is not None and demote:
            self._demote(artifact)
        return artifact is not None

    def pin(self, digest: str) -> None:
        """Keep an artifact until `unpin`. Raises MergeError if it is not here, OutOfBudget if pins would leave no room.

        Room is what the largest artifact so far needs: a pin must not stop every merge.
        """
        with self._lock:
            artifact = self._alive.get(digest)
            if artifact is None:
                raise MergeError(f"artifact {digest[:12]} is not in the cache; warm it first")
            pinned = {digest, *self._pins}
            taken = sum(self._alive[d].nbytes for d in pinned if d in self._alive)
            if taken + self._largest > self.budget_bytes:
                raise OutOfBudget(
                    f"pinning {artifact.name} would pin {taken:,} of {self.budget_bytes:,} bytes and leave no room for an "
                    f"artifact of {self._largest:,}. Unpin another or raise VLLM_MERGE_CACHE_BYTES."
                )
            self._pins.add(digest)
            self._kept.setdefault(digest, artifact)

    def unpin(self, digest: str) -> bool:
        """Says whether it was pinned."""
        with self._lock:
            pinned = digest in self._pins
            self._pins.discard(digest)
            return pinned

    def holds(self, digest: str) -> bool:
        """Whether the artifact is leased or pinned, or here."""
        with self._lock:
            return self._is_held(digest) or digest in self._alive

    def describe(self) -> dict[str, Any]:
        """What is held, for people: bytes, budget, and a row per artifact (kept: in the store; else only vLLM refers to it)."""
        with self._lock:
            rows = [
                {
                    "digest": digest,
                    "name": artifact.name,
                    "tier": "cache",
                    "origin": artifact.origin,
                    "rank": artifact.rank,
                    "bytes": artifact.nbytes,
                    "leases": self._leases[digest],
                    "last_used": round(artifact.used, 3),
                    "pinned": digest in self._pins,
                    "kept": digest in self._kept,
                    "seconds": artifact.seconds,
                    "tensors_sha256": artifact.tensors_sha256,
                }
                for digest, artifact in sorted(self._alive.items())
            ]
            total = {"bytes": self._bytes, "others_bytes": self._others(), "budget_bytes": self.budget_bytes}
            return {**total, "artifacts": rows}
