# SPDX-License-Identifier: Apache-2.0
"""An API process's connections to its workers, as one: asked together, and made again when one is lost."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from vllm_merge.serving.control.control import ControlError, Message, WorkerLink

logger = logging.getLogger("vllm_merge")

RECONNECT_SECONDS = 1.0  # between two attempts to reach a worker again


class Links:
    """again() is awaited after a lost connection was made again."""

    def __init__(self, links: list[WorkerLink], again: Callable[[], Awaitable[None]]) -> None:
        self.all = links
        self.epoch = 0
        """Changes when a connection is lost: whatever the worker held for this process is given up with it."""
        self._again = again
        self._tasks: set[asyncio.Task[None]] = set()
        for link in links:
            link.on_lost = functools.partial(self._lost, link)

    @property
    def connected(self) -> bool:
        return all(link.connected for link in self.all)

    @property
    def alarms(self) -> int:
        """How many promises all workers have broken so far."""
        return sum(link.alarms for link in self.all)

    async def ask(self, op: str, **fields: Any) -> list[Message]:
        """Every worker's answer. Raises ControlError where one refuses, once all have answered."""
        answers = []
        for reply in await self.try_all(op, **fields):
            if isinstance(reply, BaseException):
                raise reply
            answers.append(reply)
        return answers

    async def try_all(self, op: str, **fields: Any) -> list[Message | BaseException]:
        """Every worker's answer or error, in order."""
        return await asyncio.gather(*(link.call(op, **fields) for link in self.all), return_exceptions=True)

    def post(self, op: str, **fields: Any) -> None:
        """Tell every worker something whose answer nobody waits for."""
        for link in self.all:
            link.post(op, **fields)

    def _lost(self, link: WorkerLink) -> None:
        self.epoch += 1
        task = asyncio.ensure_future(self._reconnect(link))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _reconnect(self, link: WorkerLink) -> None:
        while not link.connected:
            await asyncio.sleep(RECONNECT_SECONDS)
            with contextlib.suppress(OSError, ControlError):
                await link.connect()
        logger.warning("reached the worker at %s again", link.path.name)
        await self._again()
