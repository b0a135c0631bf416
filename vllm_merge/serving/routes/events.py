# SPDX-License-Identifier: Apache-2.0
"""What happens on a server, for whoever listens at an API process: merges, evictions, and changes of what is served.

Workers tell every API process (news.py), and every API process takes each change of the state over, so that all of them tell the
same. A listener that is too slow loses the oldest events, and is told how many.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from vllm_merge.serving.control.control import Message
from vllm_merge.serving.control.state import State
from vllm_merge.serving.folders import without_folders
from vllm_merge.serving.requests.adhoc_table import EVENT as ADHOC_EVENT
from vllm_merge.serving.worker import news

MAX_LISTENERS = 32
MAX_WAITING = 256  # events of one listener
MESSAGES = ("reason", "error")  # fields whose text may come from an error
KINDS = ("hello", "merge", "eviction", "alias", "config", "adapter", "recipe", "adhoc", "experiment", "lost")


@dataclass(frozen=True)
class Event:
    """number: of this API process, from 1. kind: one of KINDS. data: JSON."""

    number: int
    kind: str
    data: dict[str, Any]


class Listener:
    """One client's events that were not sent yet."""

    def __init__(self) -> None:
        self._waiting: deque[Event] = deque()
        self._lost = 0
        self._arrived = asyncio.Event()

    def put(self, event: Event) -> None:
        if len(self._waiting) == MAX_WAITING:
            self._waiting.popleft()
            self._lost += 1
        self._waiting.append(event)
        self._arrived.set()

    async def next(self, seconds: float) -> Event | None:
        """The next event; None if none came within `seconds`."""
        if not self._waiting:
            self._arrived.clear()
            try:
                async with asyncio.timeout(seconds):
                    await self._arrived.wait()
            except TimeoutError:
                return None
        if self._lost:
            event = Event(self._waiting[0].number - 1, "lost", {"events": self._lost})
            self._lost = 0
            return event
        return self._waiting.popleft()


class EventHub:
    """The listeners of one API process. state: what is served now."""

    def __init__(self, state: Callable[[], State]) -> None:
        self._state, self._seen = state, state()
        self._listeners: set[Listener] = set()
        self._number = 0

    @property
    def full(self) -> bool:
        """Whether no further listener should be taken."""
        return len(self._listeners) >= MAX_LISTENERS

    @contextmanager
    def listen(self) -> Iterator[Listener]:
        """A listener, which hears `hello` first, for as long as the block runs."""
        listener = Listener()
        self._listeners.add(listener)
        listener.put(Event(self._number, "hello", {"generation": self._seen.generation}))
        try:
            yield listener
        finally:
            self._listeners.discard(listener)

    def publish(self, kind: str, data: dict[str, Any]) -> None:
        told = {key: without_folders(value) if key in MESSAGES else value for key, value in data.items()}
        self._number += 1
        event = Event(self._number, kind, told)
        for listener in self._listeners:
            listener.put(event)

    def on_event(self, event: Message) -> None:
        """What the control line says; to be called when the state has been taken over."""
        if event["event"] == news.EVENT:
            self.publish(event["kind"], event["data"])
        elif event["event"] == ADHOC_EVENT and event["what"] != "use":
            self.publish("adhoc", {"state": event["what"], "digest": event["digest"], "artifact": event["label"]})
        self._look()

    def _look(self) -> None:
        """Tell what has changed in the state since the last look."""
        before, now = self._seen, self._state()
        if now is before:
            return
        self._seen = now
        if now.error is not None and now.error != before.error:
            self.publish("config", {"state": "refused", "generation": now.generation, "error": now.error})
        elif now.stamp != before.stamp:
            self.publish("config", {"state": "reloaded", "generation": now.generation})
        for kind, old, new in (
            ("adapter", before.added, now.added),
            ("recipe", before.added_recipes, now.added_recipes),
        ):
            for name in sorted(old.keys() ^ new.keys()):
                state = "added" if name in new else "removed"
                self.publish(kind, {"state": state, kind: name, "generation": now.generation})
        for decision in now.trials.decisions:
            if decision not in before.trials.decisions:
                self.publish("experiment", {**asdict(decision), "generation": now.generation})
        aliases = now.names.recipes.aliases
        for alias in aliases:
            known, other = now.names.names[alias], before.names.names.get(alias)
            if other is not None and (known.label, now.target(alias)) != (other.label, _target(before, alias)):
                data = {"alias": alias, "target": now.target(alias), "artifact": known.label or None}
                self.publish("alias", {**data, "was": other.label or None, "generation": now.generation})


def _target(state: State, alias: str) -> str | None:
    return state.target(alias) if alias in state.names.recipes.aliases else None
