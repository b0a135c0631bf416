# SPDX-License-Identifier: Apache-2.0
"""Rows of the quality benchmark that are made up."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np

from benchmarks.quality import records
from benchmarks.quality.scores import Family

TASKS = ("a", "b")
KNOTS = Family("plain", 2, "ties", "knots", "lossless")
DELTA = KNOTS.other(space="delta")


def bits(share: float, seed: int, count: int = 400) -> str:
    right = np.zeros(count, dtype=bool)
    right[np.random.default_rng(seed).permutation(count)[: round(share * count)]] = True
    return records.packed(right)


def rows(
    shares: dict[tuple[str, str, str], float], kind: str = "plain", seeds: tuple[int, ...] = (0, 1)
) -> list[records.Row]:
    """Adapters that are right on 90 %, chance 50 %; merges by (method, space, rank) with this accuracy on both tasks."""
    found: list[records.Row] = []
    for seed in seeds:
        common: dict[str, Any] = {"weights": f"{kind}{seed}", "set": kind, "seed": seed}
        found += [{"kind": "single", **common, "task": task, "chance": 0.5, "bits": bits(0.9, 7)} for task in TASKS]
        for place, ((method, space, rank), share) in enumerate(shares.items()):
            found.append(
                {
                    "kind": "merge",
                    **common,
                    "tasks": list(TASKS),
                    "method": method,
                    "space": space,
                    "rank": rank,
                    "stage": "all tasks",
                    "validation": share,
                    "merge_seconds": 0.1,
                    "bits": {task: bits(share, place + 10 * seed) for task in TASKS},
                    "report": {},
                }
            )
    return found


def paired(tasks: str) -> list[records.Row]:
    """All pairs of these tasks, the loss of each foretold by one number of the report, not by the others."""
    rng = np.random.default_rng(0)
    common: dict[str, Any] = {"weights": "w", "set": "plain", "seed": 0}
    made = [{"kind": "single", **common, "task": task, "chance": 0.5, "bits": bits(0.95, 0)} for task in tasks]
    for index, pair in enumerate(combinations(tasks, 2)):
        share = 0.55 + 0.015 * index
        merged = {"tasks": list(pair), "method": "tsv_m", "space": "core", "rank": "lossless", "stage": "pairs"}
        numbers = {"cosine": 1 - share, "noise": float(rng.random()), "flat": 1.0}
        right = {task: bits(share, index) for task in pair}
        made.append({"kind": "merge", **common, **merged, "bits": right, "report": numbers})
    return made
