# SPDX-License-Identifier: Apache-2.0
"""What a search may take: requests, minutes, and until somebody ends it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Ended(Exception):
    """The search is over before its last step. reason: why, in words."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Budget:
    """requests, minutes: None for any number. stopped: asked before each request whether somebody wants it to end."""

    def __init__(
        self, requests: int | None = None, minutes: float | None = None, stopped: Callable[[], bool] = lambda: False
    ) -> None:
        self._most, self._minutes, self._stopped = requests, minutes, stopped
        self._began = time.monotonic()
        self._lock = threading.Lock()
        self.requests = 0

    @property
    def seconds(self) -> float:
        """Since the search began."""
        return time.monotonic() - self._began

    def check(self) -> None:
        """Raise Ended where no further request may be made."""
        if self._stopped():
            raise Ended("it was stopped")
        if self._minutes is not None and self.seconds > 60 * self._minutes:
            raise Ended(f"{self._minutes:g} minutes are over")
        if self._most is not None and self.requests >= self._most:
            raise Ended(f"{self._most:,} requests were made")

    def take(self) -> None:
        """Count a request. Raises Ended where it may not be made."""
        with self._lock:
            self.check()
            self.requests += 1

    def give_back(self) -> None:
        """A request was refused: the server did nothing for it."""
        with self._lock:
            self.requests -= 1
