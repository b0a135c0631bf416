# SPDX-License-Identifier: Apache-2.0
"""What is beneath a worker's cache: host memory, then disk. An artifact that left the cache comes back from the nearest."""

from __future__ import annotations

import contextlib
import logging
import queue
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from vllm_merge.errors import UserInputError
from vllm_merge.serving.memory.disk_tier import DiskTier, Stored
from vllm_merge.serving.memory.host_tier import HostTier
from vllm_merge.serving.memory.packed import Packed, SideStream
from vllm_merge.serving.memory.place import Place
from vllm_merge.serving.memory.residency import ResidentArtifact
from vllm_merge.serving.settings import DISK_VARIABLE, WorkerSettings

logger = logging.getLogger("vllm_merge.tiers")

DISK_SECONDS = 30.0  # how long the disk's place may take to give an artifact; then it is merged
WAITING_BYTES = 2 << 30  # of copies that wait for a slow disk; beyond it an artifact is not stored


class Tiers:
    """One worker's lower tiers. Either may be missing; without both, what is evicted is merged again."""

    def __init__(self, settings: WorkerSettings, device: torch.device, server: str = "") -> None:
        """server: what tells this server from others that share the disk's place. Raises UserInputError if that place cannot
        be used.
        """
        host_bytes = settings.host_bytes_on(device.type)
        self._host = HostTier(host_bytes, device) if host_bytes else None
        self._disk: DiskTier | None = None
        if settings.disk is not None:
            try:
                self._disk = DiskTier(settings.disk, settings.disk_bytes)
            except (OSError, ValueError, ImportError) as error:
                raise UserInputError(f"{DISK_VARIABLE}={settings.disk} cannot be used: {error}") from None
        self._place = Place("vllm-merge-place")
        self._reservations = self._disk.reservations(server or secrets.token_hex(8)) if self._disk is not None else None
        self._failures = 0  # of the disk's place
        self.merged_elsewhere = 0
        """Artifacts that another server merged meanwhile."""
        self._stream = SideStream(device)
        self._writes: queue.Queue[Packed | None] = queue.Queue()  # None: only look at what is in use
        self._waiting: dict[str, Packed | None] = {}  # what is in that queue, by digest; None: about to be
        self._used: set[str] = set()  # what the disk has and should know to be in use
        self._lock = threading.Lock()
        self._stored: set[str] = set()  # what this process has written or read: no need to look again

    def start(self) -> None:
        """Begin to write what is offered, in a thread of its own."""
        if self._disk is not None:
            threading.Thread(target=self._write_forever, name="vllm-merge-disk", daemon=True).start()
        if self._reservations is not None:
            self._reservations.start()

    @property
    def disk_errors(self) -> int:
        """How often the disk's place has failed."""
        return self._failures + (self._reservations.errors if self._reservations is not None else 0)

    def merge_here(self, digest: str) -> bool:
        """Whether to merge an artifact now. False: another server that shares the disk does; `await_other` waits for it.

        True is a reservation, which ends when the artifact is written, or by `release`.
        """
        return self._reservations is None or self._reservations.take(digest)

    def await_other(self, digest: str, then: Callable[[], None]) -> None:
        """Call `then` when the other server's merge is over, or takes too long; its result may then be on the disk."""
        assert self._reservations is not None
        assert self._disk is not None
        disk = self._disk

        def over() -> None:
            with contextlib.suppress(Exception):  # whatever a file system raises; who looks next is told
                self.merged_elsewhere += self._place.ask(lambda: disk.holds(digest), DISK_SECONDS)
            then()

        self._reservations.await_other(digest, over)

    def release(self, digest: str) -> None:
        """An artifact that was to be merged here will not be written."""
        if self._reservations is not None:
            self._reservations.release(digest)

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
            self._use(artifact.digest)
            self.release(artifact.digest)
            return
        packed = Packed.of(artifact)
        with self._lock:
            if artifact.digest in self._waiting:
                return
            if sum(p.nbytes for p in self._waiting.values() if p is not None) + packed.nbytes > WAITING_BYTES:
                logger.warning("%s is slow: %s was not stored", self._disk.place, artifact.name)
                self.release(artifact.digest)
                return
            self._waiting[artifact.digest] = None
        try:
            copy = packed.at(
                torch.empty_like(packed.data, device="cpu")
            )  # what waits for a disk must not take up the cache
            self._stream.copy(copy.data, packed.data)
        except BaseException:  # no memory for the copy: it may be offered again
            with self._lock:
                del self._waiting[artifact.digest]
            raise
        self._waiting[artifact.digest] = copy
        self._writes.put(copy)

    def _use(self, digest: str) -> None:
        with self._lock:
            told = digest in self._used
            self._used.add(digest)
        if not told:
            self._writes.put(None)

    def forget(self, digest: str) -> bool:
        """Remove an artifact for good; says whether it was anywhere."""
        found = self._host is not None and self._host.remove(digest)
        if (disk := self._disk) is not None:

            def remove() -> bool:
                held = disk.holds(digest)
                if held:
                    disk.remove(digest)
                return held

            try:
                found |= self._place.ask(remove, DISK_SECONDS)
            except Exception as error:  # whatever a file system raises; it stays until others need its place
                logger.error("artifact %s could not be removed from %s: %s", digest[:12], disk.place, error)
            self._stored.discard(digest)
        return found

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
        if (disk := self._disk) is None:
            return None
        try:
            stored = self._place.ask(lambda: disk.read(digest), DISK_SECONDS)
        except Exception as error:  # whatever a file system raises; the artifact can be merged
            self._failures += 1
            logger.error("artifact %s could not be read from %s: %s", digest[:12], disk.place, error)
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
            with self._lock:
                used, self._used = self._used, set()
            for digest in used:
                self._disk.touch(digest)
            if packed is not None:
                self._write(self._disk, packed)
            del packed  # while it waits, this thread keeps no artifact alive
            self._writes.task_done()

    def _write(self, disk: DiskTier, packed: Packed) -> None:
        try:
            if disk.write(packed):
                self._stored.add(packed.digest)
        except Exception as error:  # whatever a file system raises; the artifact stays where it is
            self._failures += 1
            logger.error("%s could not be stored at %s: %s", packed.name, disk.place, error)
        finally:
            self.release(packed.digest)
            with self._lock:
                del self._waiting[packed.digest]
