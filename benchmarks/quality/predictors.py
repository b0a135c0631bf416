# SPDX-License-Identifier: Apache-2.0
"""Do the numbers of the interference report foretell what a merge of two adapters loses?

Pairs that share a task are not independent, so tasks are what is drawn and permuted, not pairs: intervals by a bootstrap over
tasks, p by Mantel's permutation test (Cancer Research 27, 1967), and Holm's correction because there are many numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from scipy.stats import rankdata

from benchmarks.quality.grid import LOSSLESS, PREDICTED
from benchmarks.quality.records import Row
from benchmarks.quality.scores import Array, Interval, Scores

STRONG = 0.3  # a rank correlation under this is of no use to anybody
SURE = 0.05
FEWEST_TASKS = 5
DRAWS, PERMUTATIONS = 1000, 5000
PREDICTS, DOES_NOT = "predicts", "does not"


@dataclass(frozen=True)
class Predictor:
    """How a number of the report goes with 1 − score: Spearman's ρ over all pairs of tasks, p after Holm, the verdict."""

    number: str
    method: str
    pairs: int
    correlation: Interval
    p: float
    verdict: str = DOES_NOT


def predictors(scores: Scores) -> list[Predictor]:
    """Of every number of the report that varies, for the methods that were measured on all pairs of the first seed."""
    found = []
    for method, space in PREDICTED:
        rows = _pairs(scores, method, space)
        tasks = list(dict.fromkeys(task for pair in rows for task in pair))
        if len(tasks) < FEWEST_TASKS or len(rows) < len(tasks) * (len(tasks) - 1) / 2:
            continue
        losses = _square(tasks, {pair: scores.loss(row) for pair, row in rows.items()})
        for number in next(iter(rows.values()))["report"]:
            values = {pair: row["report"][number] for pair, row in rows.items()}
            if None not in values.values() and len(set(values.values())) >= 3:
                found.append(_correlated(number, f"{method} {space}", _square(tasks, values), losses))
    return _corrected(found)


def _pairs(scores: Scores, method: str, space: str) -> dict[tuple[str, str], Row]:
    """The merges of two plain adapters of the first seed, both of which learnt their task."""
    seed = min((row["seed"] for row in scores.merges), default=0)
    dull = {one.task for one in scores.left_out if (one.set, one.seed) == ("plain", seed)}
    wanted = ("plain", seed, method, space, LOSSLESS)
    return {
        (row["tasks"][0], row["tasks"][1]): row
        for row in scores.merges
        if tuple(row[name] for name in ("set", "seed", "method", "space", "rank")) == wanted
        and len(row["tasks"]) == 2
        and row["report"]
        and not dull & set(row["tasks"])
    }


def _square(tasks: Sequence[str], values: dict[tuple[str, str], float]) -> Array:
    """Both ways, (tasks, tasks); 0 on the diagonal, which nothing reads."""
    found = np.zeros((len(tasks), len(tasks)))
    for (one, two), value in values.items():
        i, j = tasks.index(one), tasks.index(two)
        found[i, j] = found[j, i] = value
    return found


def _correlated(number: str, method: str, values: Array, losses: Array) -> Predictor:
    rng, size = np.random.default_rng(0), len(values)
    upper = np.triu_indices(size, 1)
    ranks, lost = _square_of_ranks(values, upper), rankdata(losses[upper])
    orders = rng.permuted(np.tile(np.arange(size), (PERMUTATIONS, 1)), axis=1)
    permuted = ranks[orders[:, upper[0]], orders[:, upper[1]]]
    rho = float(_pearson(ranks[upper], lost))
    p = (1 + int((np.abs(_pearson(permuted, lost)) >= abs(rho) - 1e-9).sum())) / (1 + PERMUTATIONS)
    drawn = []
    for _ in range(DRAWS):
        chosen = rng.integers(size, size=size)
        pairs = [(i, j) for i, j in combinations(chosen, 2) if i != j]
        mine, other = (rankdata([square[pair] for pair in pairs]) for square in (values, losses))
        if len(set(mine)) > 1 and len(set(other)) > 1:
            drawn.append(float(_pearson(mine, other)))
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Predictor(number, method, len(lost), Interval(rho, float(low), float(high)), p)


def _square_of_ranks(values: Array, upper: tuple[Array, Array]) -> Array:
    found = np.zeros_like(values)
    found[upper] = rankdata(values[upper])
    return found + found.T


def _pearson(one: Array, two: Array) -> Array:
    """Along the last axis."""
    a, b = one - one.mean(-1, keepdims=True), two - two.mean()
    return np.asarray((a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum()))


def _corrected(found: Sequence[Predictor]) -> list[Predictor]:
    """With p after Holm (1979), and the verdicts by it."""
    adjusted, highest = dict[int, float](), 0.0
    for place, index in enumerate(sorted(range(len(found)), key=lambda index: found[index].p)):
        highest = max(highest, min(1.0, (len(found) - place) * found[index].p))
        adjusted[index] = highest
    clear = [adjusted[i] <= SURE and abs(one.correlation.value) >= STRONG for i, one in enumerate(found)]
    return [
        replace(one, p=adjusted[index], verdict=PREDICTS if clear[index] else DOES_NOT)
        for index, one in enumerate(found)
    ]
