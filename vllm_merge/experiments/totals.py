# SPDX-License-Identifier: Apache-2.0
"""The sums that exposures leave behind, so that reports and guardrails need not read exposures again."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sqlalchemy import Connection

from vllm_merge.experiments.bins import bin_of
from vllm_merge.experiments.records import Exposure
from vllm_merge.experiments.tables import LATENCIES, histograms, units
from vllm_merge.experiments.upsert import add_up

_SLICE = 64  # exposures after which another thread may have the interpreter: requests must not wait for the writer
_ZERO = dict.fromkeys(("requests", "errors", "refusals", "answers", "tokens"), 0) | {
    f"{latency}_{part}": 0 for latency in LATENCIES for part in ("n", "sum", "log")
}


def add_to_totals(connection: Connection, exposures: Sequence[Exposure], first: Mapping[tuple[str, int], int]) -> None:
    """Add exposures, each of which is new, to `units` and `histograms`. Only those whose arm was drawn by lot count.

    first: {(experiment, version): the first version of its phase}, under which its units are.
    """
    rows: dict[tuple[str, int, str, str], dict[str, Any]] = {}
    bins: Counter[tuple[str, int, str, str, int]] = Counter()
    for number, exposure in enumerate(exposures):
        if number % _SLICE == 0:
            time.sleep(0)
        if not exposure.counted:
            continue
        phase = first[exposure.experiment, exposure.version]
        key = (exposure.experiment, phase, exposure.arm, exposure.cluster)
        row = rows.get(key)
        if row is None:
            names = dict(zip(("experiment", "version", "arm", "unit"), key, strict=True))
            row = rows[key] = {**names, "first_at": exposure.at, "last_at": exposure.at, **_ZERO}
        row["first_at"], row["last_at"] = min(row["first_at"], exposure.at), max(row["last_at"], exposure.at)
        row["requests"] += 1
        row["errors"] += exposure.failed
        row["refusals"] += exposure.refusal
        if exposure.completion_tokens is not None and not exposure.failed:
            row["answers"] += 1
            row["tokens"] += exposure.completion_tokens
        for latency, seconds in _latencies(exposure):
            row[f"{latency}_n"] += 1
            row[f"{latency}_sum"] += seconds
            row[f"{latency}_log"] += math.log(seconds)
            bins[exposure.experiment, phase, exposure.arm, latency, bin_of(seconds)] += 1
    add_up(connection, units, list(rows.values()), least="first_at", most="last_at")
    columns = histograms.columns.keys()
    add_up(connection, histograms, [dict(zip(columns, (*key, count), strict=True)) for key, count in bins.items()])


def _latencies(exposure: Exposure) -> Iterator[tuple[str, float]]:
    """The latencies of an answer; of a failed request there are none, since to fail at once is not to be quick."""
    if exposure.failed or exposure.status >= 400:
        return
    values = (exposure.first_token, exposure.gap_mean, exposure.seconds)
    for latency, seconds in zip(LATENCIES, values, strict=True):
        if seconds is not None and seconds > 0:
            yield latency, seconds
