# SPDX-License-Identifier: Apache-2.0
"""vLLM's sleep mode: no work of ours on the device while it sleeps, and what we hold there is given back.

vLLM loads a model into a memory pool that sleep empties: level 1 copies it to the host and back, level 2 throws it away. A
pool takes the allocations of the thread that opened it, so what must outlive sleep is made by another thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from vllm_merge.errors import MergeCancelled

T = TypeVar("T")

TAGS = frozenset({"weights", "kv_cache"})  # what vLLM wakes by itself or together
STOP_SECONDS = 30.0  # how long falling asleep waits for work that runs to reach its next batch


def outside_memory_pools(device: torch.device, make: Callable[[], T]) -> T:
    """What `make` returns, run by a thread that is in no memory pool; what it launched on the device has been done."""

    def run() -> T:
        if device.type != "cuda":
            return make()
        torch.cuda.set_device(device)
        made = make()
        torch.cuda.synchronize(device)
        return made

    with ThreadPoolExecutor(1, "vllm-merge-start") as pool:
        return pool.submit(run).result()


class Wakefulness:
    """Lets background work run only while vLLM is awake."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._asleep: set[str] = set()
        self._running = 0
        self._sleeps = 0

    @property
    def asleep(self) -> bool:
        return bool(self._asleep)

    def fall_asleep(self) -> bool:
        """Let no work begin; says whether what ran has ended within the time that it is waited for."""
        with self._changed:
            self._asleep, self._sleeps = set(TAGS), self._sleeps + 1
            return self._changed.wait_for(lambda: self._running == 0, STOP_SECONDS)

    def wake_up(self, tags: Iterable[str] | None, first: Callable[[], None]) -> None:
        """tags: what vLLM has woken, None for everything. Once nothing is asleep, `first` runs, and then work may begin."""
        left = set() if tags is None else self._asleep - set(tags)
        if self._asleep and not left:
            first()
        with self._changed:
            self._asleep = left
            self._changed.notify_all()

    def awake(self, work: Callable[[], T]) -> T:
        """What `work` returns. It waits for vLLM to be awake, and begins anew if it was cancelled because vLLM fell asleep."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: not self._asleep)
                self._running += 1
                sleeps = self._sleeps
            try:
                return work()
            except MergeCancelled:
                if self._sleeps == sleeps:
                    raise
            finally:
                with self._changed:
                    self._running -= 1
                    self._changed.notify_all()
