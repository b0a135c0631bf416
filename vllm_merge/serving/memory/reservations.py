# SPDX-License-Identifier: Apache-2.0
"""Replicas that share a disk tier merge an artifact once: whoever begins reserves it there, the others wait for what it writes.

    ROOT/.merging/<digest>      who merges it, and a number that changes while they do

A reservation is a file that only one can create. A folder is exact about that, and so are object stores whose fsspec package
writes exclusively (`pipe_file(…, mode="create")`, "Exclusive write" in fsspec's documentation); elsewhere two replicas may
both merge, and write equal bytes. One whose number stands still belongs to a replica that ended. Clocks are not compared, and
nobody waits long: a reservation saves work, and is never what a result depends on.
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_merge.serving.memory.place import Place

logger = logging.getLogger("vllm_merge.tiers")

FOLDER = ".merging"
ANSWER_SECONDS = 2.0  # how long a merge waits for the place to say whether it is reserved
LOOK_SECONDS = 0.5  # between two looks at what others merge
BEAT_SECONDS = 5.0  # between two signs of life
STALE_SECONDS = 30.0  # without one, or without an answer of the place, after which a reservation counts no more
PATIENCE_SECONDS = 60.0  # how long another's merge is waited for


@dataclass
class _Other:
    """Another replica's merge that somebody here waits for."""

    then: Callable[[], None]
    sign: bytes = b""
    seen: float = field(default_factory=time.monotonic)
    since: float = field(default_factory=time.monotonic)


class Reservations:
    """Thread-safe. owner: the same for all workers of one server, which merge side by side."""

    def __init__(self, fs: Any, root: str, *, local: bool, owner: str) -> None:
        self._fs, self._folder, self._local, self._owner = fs, f"{root}/{FOLDER}", local, owner
        self._numbers = itertools.count()
        self._held: set[str] = set()
        self._others: dict[str, _Other] = {}
        self._impatient: set[str] = set()  # what was waited for long enough
        self._changed = threading.Condition()
        self._place = Place("vllm-merge-reserve")
        self.errors = 0

    def start(self) -> None:
        threading.Thread(target=self._watch_forever, name="vllm-merge-others", daemon=True).start()

    def take(self, digest: str) -> bool:
        """Whether to merge an artifact here and now; False: another replica does. A place that is slow or fails says yes."""
        with self._changed:
            if digest in self._impatient:
                self._impatient.discard(digest)
                return True

        def undo(mine: bool) -> None:  # one that comes late would never be given back
            if mine:
                self._remove(digest)

        try:
            mine = self._place.ask(lambda: self._create(digest), ANSWER_SECONDS, undo)
        except Exception as error:  # whatever a file system raises, or no answer in time
            self._failed(error)
            return True
        if mine:
            with self._changed:
                self._held.add(digest)
                self._changed.notify()
        return mine

    def release(self, digest: str) -> None:
        """The merge is over, and its result is stored if it ever will be."""
        with self._changed:
            if digest not in self._held:
                return
            self._held.discard(digest)
        self._place.submit(lambda: self._remove(digest))

    def await_other(self, digest: str, then: Callable[[], None]) -> None:
        """Call `then` when the replica that merges the artifact has ended, or was waited for long enough."""
        with self._changed:
            self._others[digest] = _Other(then)
            self._changed.notify()

    def settle(self) -> None:
        """Until everything that was released is; for tests."""
        self._place.submit(lambda: None).result()

    # -- the thread that talks to the place -------------------------------------------------------------------------------

    def _path(self, digest: str) -> str:
        return f"{self._folder}/{digest}"

    def _sign(self) -> bytes:
        return f"{self._owner} {os.getpid()} {next(self._numbers)}".encode()

    def _create(self, digest: str) -> bool:
        """Whether the reservation is this server's now."""
        path = self._path(digest)
        try:
            if self._local:
                Path(self._folder).mkdir(parents=True, exist_ok=True)
                with Path(path).open("xb") as file:
                    file.write(self._sign())
            else:
                self._fs.pipe_file(path, self._sign(), mode="create")
        except FileExistsError:
            return self._read(digest).split(b" ")[0] in (self._owner.encode(), b"")
        return True

    def _read(self, digest: str) -> bytes:
        """Empty where nobody has a reservation."""
        try:
            self._fs.invalidate_cache(self._folder)
            content: bytes = self._fs.cat_file(self._path(digest))
        except FileNotFoundError:
            return b""
        return content or b"?"  # it is being written

    def _remove(self, digest: str) -> None:
        try:
            self._fs.rm_file(self._path(digest))
        except FileNotFoundError:
            pass  # it was taken for stale
        except Exception as error:  # whatever a file system raises: it is taken for stale later
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        self.errors += 1
        logger.warning("merges are not reserved among replicas: %s: %s", type(error).__name__, error)

    # -- the thread that watches ------------------------------------------------------------------------------------------

    def _watch_forever(self) -> None:
        beaten = time.monotonic()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._held or self._others)
                held, others = list(self._held), list(self._others.items())
            for digest, other in others:
                if self._is_over(digest, other):
                    with self._changed:
                        if self._others.get(digest) is other:
                            del self._others[digest]
                    other.then()
            if time.monotonic() - beaten > BEAT_SECONDS:
                beaten = time.monotonic()
                for digest in held:
                    self._place.submit(functools.partial(self._beat, digest))
            time.sleep(LOOK_SECONDS)

    def _is_over(self, digest: str, other: _Other) -> bool:
        now = time.monotonic()
        try:
            sign = self._place.ask(lambda: self._read(digest), STALE_SECONDS)
        except Exception as error:  # whatever a file system raises, or no answer in time
            self._failed(error)
            return True
        if not sign:
            return True
        if sign != other.sign:
            other.sign, other.seen = sign, now
        if now - other.seen > STALE_SECONDS:
            logger.warning("whoever merged %s is gone; it is merged here", digest[:12])
            self._place.submit(lambda: self._remove(digest))
            return True
        if now - other.since > PATIENCE_SECONDS:
            with self._changed:
                self._impatient.add(digest)
            return True
        return False

    def _beat(self, digest: str) -> None:
        if digest not in self._held:
            return
        try:
            self._fs.pipe_file(self._path(digest), self._sign())
        except Exception as error:  # whatever a file system raises: others will merge it too
            self._failed(error)
