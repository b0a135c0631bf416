# SPDX-License-Identifier: Apache-2.0
"""Outcomes on their way to the store: each caller waits until its own are on disk, and those that come together share a commit."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from vllm_merge.experiments.records import Outcome
from vllm_merge.experiments.store import Store

MOST_TOGETHER = 5000  # outcomes of one commit


class OutcomeCommits:
    """Writes outcomes to a store, in a thread, one commit at a time. For one event loop."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._waiting: list[tuple[Sequence[Outcome], asyncio.Future[list[bool]]]] = []
        self._task: asyncio.Task[None] | None = None

    async def add(self, outcomes: Sequence[Outcome]) -> list[bool]:
        """Returns when they are on disk: for each, whether it was new. Raises StoreError; then none of them is."""
        done: asyncio.Future[list[bool]] = asyncio.get_running_loop().create_future()
        self._waiting.append((outcomes, done))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._commit())
        return await done

    async def _commit(self) -> None:
        while self._waiting:
            together: list[tuple[Sequence[Outcome], asyncio.Future[list[bool]]]] = []
            count = 0
            while self._waiting and (not together or count + len(self._waiting[0][0]) <= MOST_TOGETHER):
                together.append(self._waiting.pop(0))
                count += len(together[-1][0])
            batch = [outcome for outcomes, _ in together for outcome in outcomes]
            try:
                new = await asyncio.to_thread(self.store.add_outcomes, batch)
            except Exception as error:
                for _, done in together:
                    if not done.done():
                        done.set_exception(error)
                continue
            at = 0
            for outcomes, done in together:
                if not done.done():
                    done.set_result(new[at : at + len(outcomes)])
                at += len(outcomes)
