# SPDX-License-Identifier: Apache-2.0
"""Scores of merges with bootstrap intervals.

The score of a merge is the mean over its tasks of (accuracy − chance) / (accuracy of the task's own adapter − chance), of the
tasks whose own adapter, of that set and seed, is clearly above chance: an adapter that hardly learnt is no measure for a merge.
A draw takes seeds and test examples with replacement, the same ones for every merge and adapter, so that differences are paired.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.quality.grid import FIRST, LOSSLESS, groups
from benchmarks.quality.records import Row, unpacked
from benchmarks.quality.settings import Settings

DRAWS = 1000
LEAST_RANKS = 3  # of a curve: two are in the table already

Array = NDArray[np.float64]
Bits = NDArray[np.bool_]


@dataclass(frozen=True, order=True)
class Family:
    """The same merge at all seeds and, for fewer than all tasks, of all groups."""

    set: str
    size: int
    method: str
    space: str
    rank: str

    def other(self, **changes: Any) -> Family:
        return Family(**{**self.__dict__, **changes})


@dataclass(frozen=True)
class Interval:
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float

    def in_words(self, sign: bool = False) -> str:
        """In per cent."""
        plus = "+" if sign else ""
        return f"{100 * self.value:{plus}.1f} ({100 * self.low:{plus}.1f} to {100 * self.high:{plus}.1f})"


@dataclass(frozen=True)
class _Found:
    """One seed of a family: points (tasks,), draws (tasks, DRAWS), both of the chance-corrected share."""

    tasks: tuple[str, ...]
    points: Array
    draws: Array
    accuracies: Array

    def of(self, tasks: Collection[str]) -> _Found:
        """That of some tasks only."""
        kept = [task in tasks for task in self.tasks]
        return replace(
            self,
            tasks=tuple(task for task in self.tasks if task in tasks),
            points=self.points[kept],
            draws=self.draws[kept],
        )


@dataclass(frozen=True, order=True)
class LeftOut:
    """An adapter that no score is measured by. above: its accuracy over chance."""

    set: str
    seed: int
    task: str
    above: float


class Scores:
    """All rows of a run, arranged. tasks: those that count, in order; gate: how far above chance an adapter must be."""

    def __init__(self, rows: Sequence[Row], tasks: Sequence[str], gate: float = Settings.gate) -> None:
        self.tasks, self.gate = tuple(tasks), gate
        self.errors = [row for row in rows if row["kind"] == "merge" and "error" in row]
        self.singles = {(r["weights"], r["task"]): r for r in rows if r["kind"] == "single"}
        self.merges = [row for row in rows if row["kind"] == "merge" and "error" not in row and self._measurable(row)]
        self._draws: dict[tuple[str, str], tuple[float, Array]] = {}
        self._found: dict[tuple[Family, int], _Found] = {}

    @cached_property
    def families(self) -> dict[Family, dict[int, list[Row]]]:
        """Rows by family and seed, where all groups of the tasks are there."""
        found: dict[Family, dict[int, list[Row]]] = {}
        for row in self.merges:
            size = len(row["tasks"])
            if tuple(row["tasks"]) in groups(self.tasks, size):
                family = Family(row["set"], size, row["method"], row["space"], str(row["rank"]))
                found.setdefault(family, {}).setdefault(row["seed"], []).append(row)
        return {
            family: kept
            for family, seeds in found.items()
            if (kept := {s: mine for s, mine in seeds.items() if len(mine) == len(groups(self.tasks, family.size))})
        }

    @cached_property
    def seeds(self) -> int:
        """How many the plain adapters were trained with."""
        return len({row["seed"] for row in self.singles.values() if row["set"] == "plain"})

    @cached_property
    def left_out(self) -> list[LeftOut]:
        """Of the tasks that count, the adapters that learnt too little to measure by."""
        mine = [row for row in self.singles.values() if row["task"] in self.tasks]
        found = [LeftOut(row["set"], row["seed"], row["task"], self._above(row)) for row in mine]
        return sorted(one for one in found if one.above < self.gate)

    def score(self, family: Family, seeds: Sequence[int] | None = None, beside: Family | None = None) -> Interval:
        """The score of a family, of these seeds or all of its own; beside another one, of the tasks that both have."""
        return _interval(*self._seeds(family, seeds or sorted(self.families[family]), beside))

    def common_seeds(self, *pairs: tuple[Family, Family]) -> list[int]:
        """The seeds that all have, and at which the two of each pair have a task in common."""
        seeds = set.intersection(*(set(self.families.get(family, {})) for pair in pairs for family in pair))
        shared = lambda seed: all(set(self._of(a, seed).tasks) & set(self._of(b, seed).tasks) for a, b in pairs)
        return sorted(seed for seed in seeds if shared(seed))

    def difference(self, one: Family, two: Family) -> Interval | None:
        """How much better `one` is, over the seeds and tasks that both have; None without any."""
        return self.mean_difference([(one, two)])

    def mean_difference(self, pairs: Sequence[tuple[Family, Family]]) -> Interval | None:
        """The mean of the differences of these pairs, over the seeds that all have, each of the tasks that both have."""
        seeds = self.common_seeds(*pairs) if pairs else []
        if not seeds:
            return None
        parts = [(self._seeds(one, seeds, two), self._seeds(two, seeds, one)) for one, two in pairs]
        points = np.mean([one[0] - two[0] for one, two in parts], axis=0)
        return _interval(points, np.mean([one[1] - two[1] for one, two in parts], axis=0))

    def by_task(self, family: Family) -> dict[str, float]:
        """The score of each task, the mean over seeds."""
        parts = [self._of(family, seed) for seed in self.families[family]]
        values: dict[str, list[float]] = {}
        for part in parts:
            for task, point in zip(part.tasks, part.points, strict=True):
                values.setdefault(task, []).append(float(point))
        return {task: sum(mine) / len(mine) for task, mine in values.items()}

    def accuracy(self, family: Family) -> float:
        """The mean accuracy, not corrected."""
        return float(np.mean([self._of(family, seed).accuracies.mean() for seed in self.families[family]]))

    def validation(self, family: Family) -> float:
        """The mean score on the validation examples, by which the best is chosen."""
        return float(np.mean([row["validation"] for rows in self.families[family].values() for row in rows]))

    def seconds(self, family: Family) -> float:
        """The median time of the merge."""
        return float(np.median([row["merge_seconds"] for rows in self.families[family].values() for row in rows]))

    def loss(self, row: Row) -> float:
        """1 − score of one merge."""
        return 1 - float(self._row([row]).points.mean())

    def best(self, **fixed: Any) -> Family | None:
        """The family with these fields that is best on validation."""
        those = [f for f in self.families if all(getattr(f, name) == value for name, value in fixed.items())]
        return max(those, key=self.validation, default=None)

    def _seeds(self, family: Family, seeds: Sequence[int], beside: Family | None = None) -> tuple[Array, Array]:
        """Points (seeds,), draws (DRAWS,): seeds are drawn too."""
        parts = [self._of(family, seed) for seed in seeds]
        if beside is not None:
            others = [self._of(beside, seed).tasks for seed in seeds]
            parts = [part.of(tasks) for part, tasks in zip(parts, others, strict=True)]
        points = np.array([part.points.mean() for part in parts])
        draws = np.array([part.draws.mean(0) for part in parts])
        chosen = np.random.default_rng(0).integers(len(seeds), size=(len(seeds), DRAWS))
        return points, draws[chosen, np.arange(DRAWS)].mean(0)

    def _of(self, family: Family, seed: int) -> _Found:
        if (family, seed) not in self._found:
            self._found[family, seed] = self._row(self.families[family][seed])
        return self._found[family, seed]

    def _row(self, rows: Sequence[Row]) -> _Found:
        tasks, points, draws, accuracies = [], [], [], []
        for row in rows:
            for task, bits in row["bits"].items():
                single = self.singles[row["weights"], task]
                own, own_draws = self._accuracy(task, single["bits"])
                value, value_draws = self._accuracy(task, bits)
                accuracies.append(value)
                if self._above(single) < self.gate:
                    continue
                tasks.append(task)
                points.append((value - single["chance"]) / (own - single["chance"]))
                least = self.gate / 4  # of a draw, so that none divides by next to nothing
                draws.append((value_draws - single["chance"]) / np.maximum(own_draws - single["chance"], least))
        return _Found(tuple(tasks), np.array(points), np.array(draws), np.array(accuracies))

    def _measurable(self, row: Row) -> bool:
        """Whether any of its adapters learnt enough to measure by."""
        return any(self._above(self.singles[row["weights"], task]) >= self.gate for task in row["tasks"])

    def _above(self, single: Row) -> float:
        """How far an adapter is above chance on its task."""
        return round(float(unpacked(single["bits"]).mean()) - float(single["chance"]), 6)

    def _accuracy(self, task: str, packed: str) -> tuple[float, Array]:
        """Of all examples, and of each draw."""
        if (task, packed) not in self._draws:
            bits = unpacked(packed).astype(np.float64)
            self._draws[task, packed] = float(bits.mean()), self._weights(task, len(bits)) @ bits
        return self._draws[task, packed]

    def _weights(self, task: str, count: int) -> Array:
        """How often each draw has each example, over their number, (DRAWS, examples)."""
        key = f"{task}/{count}"
        cache: dict[str, Array] = self.__dict__.setdefault("_multinomials", {})
        if key not in cache:
            rng = np.random.default_rng(zlib.crc32(key.encode()))
            cache[key] = rng.multinomial(count, np.full(count, 1 / count), size=DRAWS) / count
        return cache[key]


def _interval(points: Array, draws: Array) -> Interval:
    low, high = np.quantile(draws, [0.025, 0.975])
    return Interval(float(points.mean()), float(low), float(high))


def curves(scores: Scores) -> dict[str, dict[str, float]]:
    """Scores of all tasks by rank, lossless last, of the methods of FIRST at the first seed; the best when lossless first."""
    seed = min((seed for seeds in scores.families.values() for seed in seeds), default=0)
    found = {}
    for method, space in FIRST:
        those = {
            family.rank: scores.score(family, [seed]).value
            for family, seeds in scores.families.items()
            if (family.set, family.size, family.method, family.space) == ("plain", len(scores.tasks), method, space)
            and seed in seeds
        }
        names = sorted(those, key=lambda rank: float("inf") if rank == LOSSLESS else int(rank))
        found[f"{method} {space}"] = {name: those[name] for name in names}
    long = {name: curve for name, curve in found.items() if len(curve) >= LEAST_RANKS}
    return dict(sorted(long.items(), key=lambda entry: -list(entry[1].values())[-1]))


def adapters(scores: Scores) -> dict[str, Mapping[str, float]]:
    """Accuracy of each task's own adapter, by set, the mean over seeds."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in scores.singles.values():
        if row["task"] in scores.tasks:
            found.setdefault(row["set"], {}).setdefault(row["task"], []).append(float(unpacked(row["bits"]).mean()))
    return {kind: {task: sum(v) / len(v) for task, v in by_task.items()} for kind, by_task in found.items()}
