# SPDX-License-Identifier: Apache-2.0
"""Exposures and pairs on their way to the store: handed over without waiting, written by a thread of its own."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence

from vllm_merge.errors import MergeError
from vllm_merge.experiments.pairs import Pair
from vllm_merge.experiments.records import Exposure
from vllm_merge.experiments.retention import delete_older
from vllm_merge.experiments.store import Store, StoreError

logger = logging.getLogger("vllm_merge")

FLUSH_SECONDS = 0.05  # with the commit, what a killed process takes with it is of less than 200 ms
BATCH = 500  # exposures of one transaction
QUEUE = 50_000  # exposures that wait while the database does not answer
MOST_PAUSE_SECONDS = 5.0
RETENTION_SECONDS = 3600.0  # between two deletions of what is old


class Writer:
    """Writes exposures to a store. `put` never waits and never raises; what does not fit is dropped and counted.

    written: records that are in the store. dropped: those that did not fit, or that the store refused for good.
    keep_days: delete what is older, once an hour.
    """

    def __init__(self, store: Store, *, queue: int = QUEUE, keep_days: float | None = None) -> None:
        self.written = self.dropped = 0
        self._store, self._most, self._keep_days = store, queue, keep_days
        self._queue: deque[Exposure | Pair] = deque()
        self._ending = threading.Event()
        self._failing = False
        self._deleted_at = float("-inf")
        self._thread = threading.Thread(target=self._run, name="vllm-merge-exposures", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Exposures that are not written yet."""
        return len(self._queue)

    def put(self, record: Exposure | Pair) -> None:
        """Hand over a record, from any thread."""
        if len(self._queue) >= self._most or self._ending.is_set():
            self.dropped += 1
            return
        self._queue.append(record)

    def close(self, timeout: float = 10.0) -> None:
        """Write what waits, for at most `timeout` seconds."""
        self._ending.set()
        self._thread.join(timeout)

    def _run(self) -> None:
        pause = FLUSH_SECONDS
        while True:
            last = self._ending.wait(pause)
            pause = FLUSH_SECONDS if self._flush() else min(2 * pause, MOST_PAUSE_SECONDS)
            if last:
                return
            self._delete_old()

    def _flush(self) -> bool:
        """Write all that waits, in batches. False where the store does not answer: then it waits on."""
        while self._queue:
            batch = [self._queue[index] for index in range(min(BATCH, len(self._queue)))]
            try:
                refused = self._write(batch)
            except StoreError as error:
                if not self._failing:
                    logger.error("exposures wait: %s", error)
                self._failing = True
                return False
            for _ in batch:
                self._queue.popleft()
            self.written += len(batch) - refused
            self.dropped += refused
        if self._failing:
            logger.warning("exposures are written again; %d were dropped so far", self.dropped)
            self._failing = False
        return True

    def _write(self, batch: Sequence[Exposure | Pair]) -> int:
        """Write a batch; how many of it the store refuses for good, so that one wrong row does not hold up the others.

        Raises StoreError where the store does not answer.
        """
        try:
            if exposures := [record for record in batch if isinstance(record, Exposure)]:
                self._store.add_exposures(exposures)
            if pairs := [record for record in batch if isinstance(record, Pair)]:
                self._store.add_pairs(pairs)
            return 0
        except StoreError:
            raise
        except Exception as error:
            if len(batch) == 1:
                return 1
            logger.error("not every exposure can be written: %s", error)
        return sum(self._write([record]) for record in batch)

    def _delete_old(self) -> None:
        if self._keep_days is None or time.monotonic() < self._deleted_at + RETENTION_SECONDS:
            return
        self._deleted_at = time.monotonic()
        try:
            delete_older(self._store, self._keep_days)
        except MergeError as error:
            logger.error("what is older than %g days is not deleted: %s", self._keep_days, error)
