# SPDX-License-Identifier: Apache-2.0
"""Calls on a place that may hang (a mounted folder, an object store), none of which is waited for longer than its caller says."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class PlaceHangs(OSError):
    """A place has not answered in time."""


class Place:
    """A thread that makes calls one after another; thread-safe. A daemon: a call that hangs must not keep the process from
    ending.
    """

    def __init__(self, thread_name: str) -> None:
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()
        self._hanging: Future[Any] | None = None  # the call that was not answered in time
        threading.Thread(target=self._make_forever, name=thread_name, daemon=True).start()

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """Make a call after those before it; nobody waits for it."""
        future: Future[T] = Future()
        self._calls.put((call, future))
        return future

    def ask(self, call: Callable[[], T], seconds: float, late: Callable[[T], object] = lambda result: None) -> T:
        """What a call returns. Raises what it raises, or PlaceHangs: after `seconds`, or at once where an earlier call that was
        given up still has no answer. late: what to do with the result of a call that was given up.
        """
        if self._hanging is not None:
            raise PlaceHangs("an earlier call still has no answer")
        asked = self.submit(call)
        try:
            return asked.result(seconds)
        except TimeoutError:
            if asked.done():
                raise  # the call itself says so
            self._hanging = asked
            asked.add_done_callback(lambda done: self._came(done, late))
            raise PlaceHangs(f"no answer within {seconds:g} s") from None

    def _came(self, done: Future[T], late: Callable[[T], object]) -> None:
        if self._hanging is done:
            self._hanging = None
        if done.exception() is None:
            late(done.result())

    def _make_forever(self) -> None:
        while True:
            call, future = self._calls.get()
            try:
                future.set_result(call())
            except Exception as error:  # whatever a file system raises
                future.set_exception(error)
            del call, future  # while it waits, this thread keeps no result alive
