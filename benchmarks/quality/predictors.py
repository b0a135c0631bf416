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

from benchmarks.quality.grid import LOSSLESS, PREDICTED, UNEQUAL
from benchmarks.quality.records import Row
from benchmarks.quality.scores import Array, Interval, Scores

STRONG = 0.3  # a rank correlation under this is of no use to anybody
SURE = 0.05
FEWEST_TASKS = 5
DRAWS, PERMUTATIONS = 1000, 5000
PREDICTS, DOES_NOT = "predicts", "does not"
MIXED = "mixed"  # the set whose adapters have very different norms


@dataclass(frozen=True)
class Predictor:
    """How a number of the report goes with 1 − score: Spearman's ρ over all pairs of tasks, p after Holm, the verdict."""

    number: str
    method: str
    pairs: int
    correlation: Interval
    p: float
    verdict: str = DOES_NOT


@dataclass(frozen=True)
class Gains:
    """What DO-Merging gives over task arithmetic on pairs of mixed adapters. ratios: of each pair, the larger norm over the smaller;
    gains: its score with the one − with the other; mean: of the gains; with_ratio: how they go with the ratios."""

    ratios: tuple[float, ...]
    gains: tuple[float, ...]
    mean: Interval
    with_ratio: Predictor


def predictors(scores: Scores) -> list[Predictor]:
    """Of every number of the report that varies, for the methods that were measured on all pairs of the first seed."""
    found = []
    for kind, (method, space) in (*(("plain", entry) for entry in PREDICTED), *((MIXED, entry) for entry in UNEQUAL)):
        rows = _pairs(scores, method, space, kind)
        name = f"{method} {space}{', mixed' if kind == MIXED else ''}"
        tasks = list(dict.fromkeys(task for pair in rows for task in pair))
        if len(tasks) < FEWEST_TASKS or len(rows) < len(tasks) * (len(tasks) - 1) / 2:
            continue
        losses = _square(tasks, {pair: scores.loss(row) for pair, row in rows.items()})
        for number in next(iter(rows.values()))["report"]:
            values = {pair: row["report"][number] for pair, row in rows.items()}
            if None not in values.values() and len(set(values.values())) >= 3:
                found.append(_correlated(number, name, _square(tasks, values), losses))
    return _corrected(found)


def unequal(scores: Scores) -> Gains | None:
    """Of all pairs of the first seed; None where one was not measured."""
    plain, ours = (_pairs(scores, method, space, MIXED) for method, space in UNEQUAL)
    tasks = list(dict.fromkeys(task for pair in plain for task in pair))
    if len(tasks) < FEWEST_TASKS or plain.keys() != ours.keys() or len(plain) < len(tasks) * (len(tasks) - 1) / 2:
        return None
    gains = {pair: scores.loss(row) - scores.loss(ours[pair]) for pair, row in plain.items()}
    ratios = {pair: float(row["report"]["norm ratio"]) for pair, row in plain.items()}
    square, rng = _square(tasks, gains), np.random.default_rng(0)
    draws = [_between(square, rng.integers(len(tasks), size=len(tasks)).tolist()) for _ in range(DRAWS)]
    low, high = np.quantile([np.mean(draw) for draw in draws if draw], [0.025, 0.975])
    mean = Interval(float(np.mean(list(gains.values()))), float(low), float(high))
    found = _correlated("norm ratio", "do_merging over task_arithmetic", _square(tasks, ratios), square)
    return Gains(tuple(ratios.values()), tuple(gains.values()), mean, found)


def _between(square: Array, chosen: Sequence[int]) -> list[float]:
    """The values of the pairs of what was drawn, without those of a task with itself."""
    return [float(square[i, j]) for i, j in combinations(chosen, 2) if i != j]


def _pairs(scores: Scores, method: str, space: str, kind: str = "plain") -> dict[tuple[str, str], Row]:
    """The merges of two adapters of the first seed, both of which learnt their task."""
    seed = min((row["seed"] for row in scores.merges), default=0)
    dull = {one.task for one in scores.left_out if (one.set, one.seed) == (kind, seed)}
    wanted = (kind, seed, method, space, LOSSLESS)
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
        chosen = rng.integers(size, size=size).tolist()
        mine, other = (rankdata(_between(square, chosen)) for square in (values, losses))
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
