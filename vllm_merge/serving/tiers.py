# SPDX-License-Identifier: Apache-2.0
"""What is beneath a worker's cache: host memory, then disk. An artifact that left the cache comes back from the nearest."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from vllm_merge.errors import UserInputError
from vllm_merge.serving.disk_tier import DiskTier, Stored
from vllm_merge.serving.host_tier import HostTier
from vllm_merge.serving.packed import Packed, SideStream
from vllm_merge.serving.residency import ResidentArtifact
from vllm_merge.serving.settings import DISK_VARIABLE, WorkerSettings

logger = logging.getLogger("vllm_merge.tiers")

WAITING_BYTES = 2 << 30  # of copies that wait for a slow disk; beyond it an artifact is not stored


class Tiers:
    """One worker's lower tiers. Either may be missing; without both, what is evicted is merged again."""

    def __init__(self, settings: WorkerSettings, device: torch.device) -> None:
        """Raises UserInputError if the disk's place cannot be used."""
        host_bytes = settings.host_bytes_on(device.type)
        self._host = HostTier(host_bytes, device) if host_bytes else None
        self._disk: DiskTier | None = None
        if settings.disk is not None:
            try:
                self._disk = DiskTier(settings.disk, settings.disk_bytes)
            except (OSError, ValueError, ImportError) as error:
                raise UserInputError(f"{DISK_VARIABLE}={settings.disk} cannot be used: {error}") from None
        self._stream = SideStream(device)
        self._writes: queue.Queue[Packed] = queue.Queue()
        self._waiting: dict[str, Packed | None] = {}  # what is in that queue, by digest; None: about to be
        self._used: queue.SimpleQueue[str] = queue.SimpleQueue()  # what the disk has and should know to be in use
        self._lock = threading.Lock()
        self._stored: set[str] = set()  # what this process has written or read: no need to look again

    def start(self) -> None:
        """Begin to write what is offered, in a thread of its own."""
        if self._disk is not None:
            threading.Thread(target=self._write_forever, name="vllm-merge-disk", daemon=True).start()

    @property
    def any(self) -> bool:
        return self._host is not None or self._disk is not None

    def near(self, digest: str) -> bool:
        """Whether host memory has it, so that it is back in no time."""
        return self._host is not None and self._host.holds(digest)

    def demote(self, artifact: ResidentArtifact) -> None:
        """An artifact leaves the cache."""
        if self._host is not None:
            self._host.put(Packed.of(artifact))
        self.store(artifact)

    def store(self, artifact: ResidentArtifact) -> None:
        """See to it that the disk has an artifact, by and by."""
        if self._disk is None or artifact.tensors_sha256 is None:
            return  # without a hash nobody could tell later whether it is whole: it is offered again once it has one
        if artifact.digest in self._stored:
            self._used.put(artifact.digest)
            return
        packed = Packed.of(artifact)
        with self._lock:
            if artifact.digest in self._waiting:
                return
            if sum(p.nbytes for p in self._waiting.values() if p is not None) + packed.nbytes > WAITING_BYTES:
                logger.warning("%s is slow: %s was not stored", self._disk.place, artifact.name)
                return
            self._waiting[artifact.digest] = None
        with self._stream.use():
            copy = packed.at(packed.data.to("cpu", copy=True))  # what waits for a disk must not take up the cache
        self._waiting[artifact.digest] = copy
        self._writes.put(copy)

    @contextmanager
    def fetch(self, digest: str) -> Iterator[tuple[str, Packed | Stored] | None]:
        """The nearest tier that has an artifact, and the artifact, whose bytes stay as they are until the block ends."""
        if self._host is not None:
            with self._host.borrow(digest) as packed:
                if packed is not None:
                    yield "host", packed
                    return
        if (waiting := self._waiting.get(digest)) is not None:
            yield "host", waiting
            return
        stored = self._read(digest)
        yield ("disk", stored) if stored is not None else None

    def wait(self) -> None:
        """Until everything that was offered is written; for tests and for the end of a program."""
        self._writes.join()

    def describe(self) -> dict[str, Any]:
        return {
            "host": self._host.describe() if self._host is not None else None,
            "disk": self._disk.describe() if self._disk is not None else None,
        }

    def _read(self, digest: str) -> Stored | None:
        if self._disk is None:
            return None
        try:
            stored = self._disk.read(digest)
        except Exception as error:  # whatever a file system raises; the artifact can be merged
            logger.error("artifact %s could not be read from %s: %s", digest[:12], self._disk.place, error)
            return None
        if stored is not None:
            self._stored.add(digest)
        else:
            self._stored.discard(digest)
        return stored

    def _write_forever(self) -> None:
        assert self._disk is not None
        while True:
            packed = self._writes.get()
            try:
                while not self._used.empty():
                    self._disk.touch(self._used.get())
                if self._disk.write(packed):
                    self._stored.add(packed.digest)
            except Exception as error:  # whatever a file system raises; the artifact stays where it is
                logger.error("%s could not be stored at %s: %s", packed.name, self._disk.place, error)
            finally:
                with self._lock:
                    del self._waiting[packed.digest]
                del packed
                self._writes.task_done()
