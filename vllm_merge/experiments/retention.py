# SPDX-License-Identifier: Apache-2.0
"""How long the store keeps what came from people: exposures, outcomes, pairs and sums over units. Decisions and definitions stay."""

from __future__ import annotations

import time

from sqlalchemy import ColumnElement, Table, delete, exists, select, tuple_

from vllm_merge.experiments.store import Store
from vllm_merge.experiments.tables import exposures, histograms, outcomes, pairs, units

BATCH = 2000  # rows of one transaction: others write between two of them
_REST_SECONDS = 0.02
_DAY = 86_400.0


def delete_older(store: Store, days: float, now: float | None = None) -> dict[str, int]:
    """Delete what is older than `days`, in small transactions. Returns {table: rows that went}. Raises StoreError.

    A unit goes when it was last seen so long ago; the latencies of an experiment's version when all its units have gone.
    """
    before = (time.time() if now is None else now) - days * _DAY
    gone = {}
    times = (exposures.c.at, outcomes.c.at, pairs.c.at, units.c.last_at)
    for table, column in zip((exposures, outcomes, pairs, units), times, strict=True):
        gone[table.name] = _delete(store, table, column < before)
    same = (units.c.experiment == histograms.c.experiment) & (units.c.version == histograms.c.version)
    if gone[units.name]:
        gone[histograms.name] = _delete(store, histograms, ~exists().where(same))
    return gone


def _delete(store: Store, table: Table, old: ColumnElement[bool]) -> int:
    keys = list(table.primary_key)
    some = select(*keys).where(old).limit(BATCH)
    statement = delete(table).where(tuple_(*keys).in_(some))
    count = 0
    while True:
        with store.writing() as connection:
            went = connection.execute(statement).rowcount
        count += went
        if went < BATCH:
            return count
        time.sleep(_REST_SECONDS)
