# SPDX-License-Identifier: Apache-2.0
"""What the plan has and the recorded rows have not, in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from benchmarks.quality.grid import LOSSLESS, Config, plan
from benchmarks.quality.learning import METHODS
from benchmarks.quality.records import Row, key
from benchmarks.quality.settings import Settings


def unmeasured(run: Mapping[str, Any], rows: Sequence[Row]) -> Iterator[str]:
    """Counts by set, size, seed and rank, and the names of what no seed has; nothing where all is measured."""
    given, tasks = run["settings"], run["gate"]["counted"]
    settings = replace(
        Settings(), tasks=given["tasks"], **{name: tuple(given[name]) for name in ("seeds", "sizes", "ranks")}
    )
    configs, there = plan(settings, tasks), {key(row) for row in rows}
    done = {place for place, config in enumerate(configs) if key(config.row()) in there}
    parts: dict[tuple[str, int, str], list[int]] = {}
    for place, config in enumerate(configs):
        parts.setdefault(_part(config, settings), []).append(place)
    left = {part: places for part, places in parts.items() if not done.issuperset(places)}
    runs = {seed: [m for m in METHODS if key(_learned(tasks, seed, m)) not in there] for seed in settings.seeds}
    if not left and not any(runs.values()):
        return
    yield "The plan goes on where time ended. What no merge was measured of says nothing, for or against a method.\n"
    yield "| adapters | tasks | rank | merges measured | planned |\n|---|---|---|---|---|"
    for (kind, size, rank), places in left.items():
        yield f"| {kind} | {size} | {rank} | {len(done.intersection(places))} | {len(places)} |"
    largest = [(p, c) for p, c in enumerate(configs) if (c.set, len(c.tasks)) == ("plain", len(tasks))]
    seen = {(config.method, config.space) for place, config in largest if place in done}
    missing = sorted({(config.method, config.space) for _, config in largest} - seen)
    if missing:
        names = ", ".join(f"{method} {space}" for method, space in missing)
        yield f"\nOf plain adapters, all tasks, at no seed ({len(missing)} of {len(missing) + len(seen)}): {names}."
    for seed, methods in runs.items():
        if methods:
            yield f"\nLearners, seed {seed}: {'none' if len(methods) == len(METHODS) else 'all but ' + ', '.join(methods)}."
    yield ""


def _part(config: Config, settings: Settings) -> tuple[str, int, str]:
    """Set, number of tasks, and lossless, the usual rank or the others of the curve."""
    usual = config.rank == LOSSLESS or config.rank in settings.ranks
    return config.set, len(config.tasks), str(config.rank) if usual else "others"


def _learned(tasks: Sequence[str], seed: int, method: str) -> Row:
    return {"kind": "learned", "set": "plain", "seed": seed, "tasks": list(tasks), "method": method, "rank": LOSSLESS}
