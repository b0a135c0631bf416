# SPDX-License-Identifier: Apache-2.0
"""Scores of merges with bootstrap intervals.

The score of a merge is the mean over its tasks of (accuracy − chance) / (accuracy of the task's own adapter − chance). A draw
takes seeds and test examples with replacement, the same ones for every merge and adapter, so that differences are paired.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.quality.grid import groups
from benchmarks.quality.records import Row, unpacked

DRAWS = 1000
LEAST = 0.05  # above chance: an adapter that learnt less is no measure for a merge

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


class Scores:
    """All rows of a run, arranged. tasks: those that count, in order."""

    def __init__(self, rows: Sequence[Row], tasks: Sequence[str]) -> None:
        self.tasks = tuple(tasks)
        self.errors = [row for row in rows if row["kind"] == "merge" and "error" in row]
        self.singles = {(r["weights"], r["task"]): r for r in rows if r["kind"] == "single"}
        self.merges = [row for row in rows if row["kind"] == "merge" and "error" not in row and self._measurable(row)]
        self._draws: dict[tuple[str, str], tuple[float, Array]] = {}
        self._found: dict[tuple[Family, int], _Found | None] = {}

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

    def score(self, family: Family, seeds: Sequence[int] | None = None) -> Interval:
        """The score of a family, of these seeds or all of its own."""
        return _interval(*self._seeds(family, seeds or sorted(self.families[family])))

    def difference(self, one: Family, two: Family) -> Interval | None:
        """How much better `one` is, over the seeds that both have; None without any."""
        seeds = sorted(self.families.get(one, {}).keys() & self.families.get(two, {}).keys())
        if not seeds:
            return None
        (first, first_draws), (second, second_draws) = self._seeds(one, seeds), self._seeds(two, seeds)
        return _interval(first - second, first_draws - second_draws)

    def mean_difference(self, pairs: Sequence[tuple[Family, Family]]) -> Interval | None:
        """The mean of the differences of these pairs, over the seeds that all have."""
        seeds = sorted(set.intersection(*(set(self.families[f]) for pair in pairs for f in pair))) if pairs else []
        if not seeds:
            return None
        parts = [(self._seeds(one, seeds), self._seeds(two, seeds)) for one, two in pairs]
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

    def _seeds(self, family: Family, seeds: Sequence[int]) -> tuple[Array, Array]:
        """Points (seeds,), draws (DRAWS,): seeds are drawn too."""
        parts = [self._of(family, seed) for seed in seeds]
        points = np.array([part.points.mean() for part in parts])
        draws = np.array([part.draws.mean(0) for part in parts])
        chosen = np.random.default_rng(0).integers(len(seeds), size=(len(seeds), DRAWS))
        return points, draws[chosen, np.arange(DRAWS)].mean(0)

    def _of(self, family: Family, seed: int) -> _Found:
        if (family, seed) not in self._found:
            self._found[family, seed] = self._row(self.families[family][seed])
        found = self._found[family, seed]
        assert found is not None
        return found

    def _row(self, rows: Sequence[Row]) -> _Found:
        tasks, points, draws, accuracies = [], [], [], []
        for row in rows:
            for task, bits in row["bits"].items():
                single = self.singles[row["weights"], task]
                own, own_draws = self._accuracy(task, single["bits"])
                value, value_draws = self._accuracy(task, bits)
                above = own - single["chance"]
                accuracies.append(value)
                if above < LEAST:
                    continue
                tasks.append(task)
                points.append((value - single["chance"]) / above)
                draws.append((value_draws - single["chance"]) / np.maximum(own_draws - single["chance"], LEAST / 2))
        return _Found(tuple(tasks), np.array(points), np.array(draws), np.array(accuracies))

    def _measurable(self, row: Row) -> bool:
        """Whether any of its adapters learnt enough to measure by."""
        singles = [self.singles[row["weights"], task] for task in row["tasks"]]
        return any(unpacked(single["bits"]).mean() - single["chance"] >= LEAST for single in singles)

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


def adapters(scores: Scores) -> dict[str, Mapping[str, float]]:
    """Accuracy of each task's own adapter, by set, the mean over seeds; and under `norm` the adapters' norms."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in scores.singles.values():
        if row["task"] in scores.tasks:
            found.setdefault(row["set"], {}).setdefault(row["task"], []).append(float(unpacked(row["bits"]).mean()))
    return {kind: {task: sum(v) / len(v) for task, v in by_task.items()} for kind, by_task in found.items()}
