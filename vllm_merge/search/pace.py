# SPDX-License-Identifier: Apache-2.0
"""How many requests are under way: few enough, fewer where the server is busy, so that other traffic comes first."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LONGEST_LOOK = 0.2  # seconds between two looks at whether the search goes on


class Pace:
    """At most `most` requests at once. A refusal halves that and lets all wait; every answer gives a little back."""

    def __init__(self, most: int, check: Callable[[], None]) -> None:
        """check: raises where nobody may wait any longer."""
        self._most, self._now, self._running, self._until = most, float(most), 0, 0.0
        self._changed = threading.Condition()
        self._check = check

    @property
    def at_once(self) -> int:
        """How many may be under way now."""
        return int(self._now)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """A place among those that are under way. Raises what `check` raises."""
        with self._changed:
            while self._running >= int(self._now) or time.monotonic() < self._until:
                self._check()
                self._changed.wait(LONGEST_LOOK)
            self._running += 1
        try:
            yield
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    def answered(self) -> None:
        """The server had time for a request."""
        with self._changed:
            self._now = min(float(self._most), self._now + 1 / self._now)

    def refused(self, seconds: float) -> None:
        """The server has no time for `seconds`. Refusals of requests that ran side by side count once."""
        with self._changed:
            if time.monotonic() >= self._until:
                self._now = max(1.0, self._now / 2)
            self._until = max(self._until, time.monotonic() + seconds)

    def wait(self, seconds: float) -> None:
        """Wait alone. Raises what `check` raises."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            self._check()
            time.sleep(min(left, LONGEST_LOOK))
