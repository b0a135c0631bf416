# SPDX-License-Identifier: Apache-2.0
"""Every experiment of a store, in a line each."""

from __future__ import annotations

import time
from typing import Any

from sqlalchemy import func, select

from vllm_merge.experiments.defined import running_of
from vllm_merge.experiments.report import state
from vllm_merge.experiments.store import Store
from vllm_merge.experiments.tables import units


def overview(store: Store) -> list[dict[str, Any]]:
    """The newest version of each: experiment, version, state, arms, primary, units, last (seconds since the epoch, or None)."""
    decisions, now = store.decisions(), time.time()
    wanted = select(units.c.experiment, units.c.version, func.count(), func.max(units.c.last_at))
    with store.reading() as connection:
        rows = connection.execute(wanted.group_by(units.c.experiment, units.c.version)).all()
    seen = {(experiment, version): (count, last) for experiment, version, count, last in rows}
    found = []
    for definition in store.definitions():
        running = running_of(definition)
        primary = running.experiment.primary
        count, last = seen.get((running.name, store.phase(running.name, running.version)), (0, None))
        found.append(
            {
                "experiment": running.name,
                "version": running.version,
                "state": state(running, [d for d in decisions if d.experiment == running.name], now),
                "arms": list(running.experiment.arms),
                "primary": primary.metric if primary else None,
                "units": count,
                "last": last,
            }
        )
    return found
