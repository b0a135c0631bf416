# SPDX-License-Identifier: Apache-2.0
"""A number in shared memory that a worker raises when it could not keep a promise.

A message could come after the tokens that it is about. The number cannot: the worker raises it inside the step, before the
step's tokens exist, and the API process looks at it whenever an output arrives. Only when it has changed does it ask.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

SIZE = 8  # bytes, one unsigned little-endian integer


def alarm_path(socket_path: Path) -> Path:
    """The file beside a worker's socket."""
    return socket_path.with_suffix(".alarm")


class Alarm:
    """The worker's side."""

    def __init__(self, path: Path) -> None:
        path.write_bytes(bytes(SIZE))
        path.chmod(0o600)
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), SIZE)
        self.count = 0

    def ring(self) -> None:
        self.count += 1
        self._memory[:] = struct.pack("<Q", self.count)


class Watch:
    """The API process's side. `count` is the same for as long as every promise was kept."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._memory = mmap.mmap(file.fileno(), SIZE, prot=mmap.PROT_READ)

    @property
    def count(self) -> int:
        (count,) = struct.unpack("<Q", self._memory[:])
        return int(count)
