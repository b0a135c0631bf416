# SPDX-License-Identifier: Apache-2.0
"""As much of torch's CUDA as an arena uses, played without a device: its caching allocator, and what cuBLAS keeps.

As in torch, a tensor lies in a segment of the pool of its thread, where one is in use, else of its stream; a segment goes back
to the driver when nothing lies in it; and the first product of a thread on a stream takes a workspace that stays.
"""

import contextlib
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

WORKSPACE = 32
SMALL = 0  # bytes of what is too small to count


class Segment:
    def __init__(self, pool: object, size: int) -> None:
        self.pool, self.size = pool, size
        self.used = 0


class Stream:
    def synchronize(self) -> None:
        """Everything is done at once."""


class Block:
    """A tensor. Bytes of a segment, until nothing refers to it."""

    def __init__(self, cuda: "PlayedCuda", segment: Segment, size: int) -> None:
        self._cuda, self._segment, self._size = cuda, segment, size
        segment.used += size

    def __del__(self) -> None:
        self._segment.used -= self._size

    def __getitem__(self, index: int) -> "Block":
        return self

    def __matmul__(self, other: "Block") -> "Block":
        return self._cuda.product()


class PlayedCuda:
    """Stands for the module `torch`. capacity: bytes that the driver has."""

    uint8 = None

    class OutOfMemoryError(Exception):
        pass

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._segments: list[Segment] = []
        self._workspaces: dict[tuple[int, object], Block] = {}
        self._thread = threading.local()
        self.cuda = SimpleNamespace(
            Stream=lambda device: Stream(),
            default_stream=lambda device: None,
            MemPool=object,
            stream=lambda stream: self._within("stream", stream),
            use_mem_pool=lambda pool, device: self._within("pool", pool),
            set_device=lambda device: None,
            empty_cache=self._empty_cache,
        )

    @property
    def taken(self) -> int:
        """Bytes that the driver has given."""
        return sum(segment.size for segment in self._segments)

    @contextlib.contextmanager
    def _within(self, what: str, value: object) -> Iterator[None]:
        before = getattr(self._thread, what, None)
        setattr(self._thread, what, value)
        try:
            yield
        finally:
            setattr(self._thread, what, before)

    def _empty_cache(self) -> None:
        self._segments = [segment for segment in self._segments if segment.used]

    def empty(self, size: int, **options: Any) -> Block:
        pool = getattr(self._thread, "pool", None) or getattr(self._thread, "stream", None)
        for segment in self._segments:
            if segment.pool is pool and segment.size - segment.used >= size:
                return Block(self, segment, size)
        if self.taken + size > self.capacity:
            raise self.OutOfMemoryError
        self._segments.append(Segment(pool, size))
        return Block(self, self._segments[-1], size)

    def ones(self, *shape: int, **options: Any) -> Block:
        return self.empty(SMALL)

    def addmm(self, *factors: Block) -> Block:
        return self.product()

    def product(self) -> Block:
        key = threading.get_ident(), getattr(self._thread, "stream", None)
        if key not in self._workspaces:
            self._workspaces[key] = self.empty(WORKSPACE)
        return self.empty(SMALL)
