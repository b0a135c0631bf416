# SPDX-License-Identifier: Apache-2.0
"""An API process's connection to the one owner of what all API processes serve (owner.py)."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from vllm_merge.serving.control.control import Message, WorkerLink
from vllm_merge.serving.control.state import State


class SharedState:
    """adopt(state) takes a new state over; when it returns, this process must answer from it alone."""

    def __init__(self, link: WorkerLink, adopt: Callable[[State], None]) -> None:
        self._link = link
        self._adopt = adopt
        self._turn = asyncio.Lock()  # one change at a time within this process
        self._numbers = [0, 0]  # of the state before, and of the state that this process has
        self._states: list[State | None] = [None, None]

    @property
    def state(self) -> State | None:
        """The newest state, which this process serves; None if no process has proposed one yet."""
        return self._states[-1]

    def as_of(self, number: int) -> State | None:
        """The state as of the owner's `number`: the newest, or while some process still lacks that, the one before."""
        return self._states[0] if number < self._numbers[-1] else self._states[-1]

    async def join(self) -> None:
        """Take over what other processes serve, and follow from now on, also after a lost connection. Raises ControlError."""
        self._link.on_connect = self._introduce
        await self._introduce()

    async def _introduce(self) -> None:
        reply = await self._link.introduce("join", pid=os.getpid())
        if reply["number"] > self._numbers[-1]:
            self._take(reply)

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[State | None]:
        """The right to change the state: no other process changes it meanwhile, and all have the newest. Raises ControlError."""
        async with self._turn:
            try:
                await self._link.call("take_turn")
                yield self.state
            finally:
                self._link.post("give_turn")

    async def leads(self) -> bool:
        """Whether this process is the one that does what one is to do for all. Raises ControlError."""
        return bool((await self._link.call("lead"))["leads"])

    async def propose(self, state: State) -> None:
        """Returns once every API process has taken `state` over. Raises ControlError. Only within a turn."""
        await self._link.call("propose", state=state.to_message())

    def on_event(self, event: Message) -> None:
        if event["event"] == "adopt":
            self._take(event)
            self._link.post("adopted", number=event["number"])

    def _take(self, message: Message) -> None:
        state = State.from_message(message["state"])
        self._adopt(state)
        self._numbers = [self._numbers[-1], message["number"]]
        self._states = [self._states[-1], state]
