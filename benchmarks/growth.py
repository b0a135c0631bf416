# SPDX-License-Identifier: Apache-2.0
"""Which rows of merge_speed.json differ in one thing alone, and how time and memory grow with it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

ALONG = {"n": "adapters", "r": "rank of the adapters", "layers": "layers"}
Row = dict[str, Any]


def took(row: Row) -> float:
    """The median in seconds; where that is known, how long one thread worked, which a busy machine does not change."""
    return float(row.get("busy_seconds") or row["seconds"])


def series(rows: list[Row], key: str) -> dict[str, list[Row]]:
    """{case: its rows in order of `key`} that share everything else with the row most others are measured around."""
    others = [other for other in ALONG if other != key]
    found: dict[str, list[Row]] = {}
    for case in dict.fromkeys(row["case"] for row in rows):
        groups: dict[tuple[object, ...], dict[int, Row]] = defaultdict(dict)
        for row in rows:
            if row["case"] == case and row["part"] in ("table", "growth"):
                family = row["shape"].partition(":")[0]
                groups[(family, *(row[other] for other in others))][row[key]] = row
        longest = max(groups.values(), key=len, default={})
        if len(longest) > 1:
            found[case] = [longest[value] for value in sorted(longest)]
    return found


def exponents(rows: list[Row]) -> Iterator[str]:
    """A line for each case and each thing that grows: the power of it that seconds and workspace go with."""
    for key, label in ALONG.items():
        for case, line in series(rows, key).items():
            first, last = line[0], line[-1]
            times = math.log(last[key] / first[key])
            seconds = math.log(took(last) / took(first)) / times
            held = math.log(max(1, last["workspace_bytes"]) / max(1, first["workspace_bytes"])) / times
            values = ", ".join(f"{row[key]}: {1e3 * took(row):.1f} ms" for row in line)
            yield f"{case:20} {label:21} power {seconds:5.2f} of time, {held:5.2f} of workspace  ({values})"
    shapes: dict[tuple[str, int, int], dict[str, Row]] = defaultdict(dict)
    for row in rows:
        if row["part"] in ("table", "growth") and ":" not in row["shape"]:
            shapes[row["case"], row["n"], row["r"]][row["shape"]] = row
    for (case, n, r), by_shape in shapes.items():
        if len(by_shape) > 1:
            values = ", ".join(f"{shape}: {1e3 * took(row):.1f} ms" for shape, row in by_shape.items())
            yield f"{case:20} {'shape':21} n={n} r={r}  ({values})"
