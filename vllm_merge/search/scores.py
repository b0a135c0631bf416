# SPDX-License-Identifier: Apache-2.0
"""What the values of a candidate come to: the mean of its tasks, with a 95 % interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vllm_merge.evaluation.scores import wilson


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean of `count` values and its interval [low, high]."""

    mean: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Estimates:
    """By task, and the mean of the tasks, each counting alike."""

    mean: Estimate
    tasks: dict[str, Estimate]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)


def estimate(tasks: Sequence[str], values: Sequence[float], *, shares: bool) -> Estimates:
    """The estimates of values, one for each example, whose tasks these are.

    shares: values are known to be between 0 and 1; where they are not (grades, metrics of the harness), they count as such if all are.

    Right or wrong: Wilson's interval; other values: Student's t. The mean's interval combines those of the tasks (Zou and
    Donner, Statistics in Medicine 27, 2008). A single value that is neither 0 nor 1 has no interval: it is infinite.
    """
    shares = shares or all(0.0 <= value <= 1.0 for value in values)
    groups: dict[str, list[float]] = {}
    for task, value in zip(tasks, values, strict=True):
        groups.setdefault(task, []).append(value)
    found = {task: _of_task(group, shares) for task, group in groups.items()}
    parts = list(found.values())
    mean = math.fsum(part.mean for part in parts) / len(parts)
    below = math.sqrt(math.fsum((part.mean - part.low) ** 2 for part in parts)) / len(parts)
    above = math.sqrt(math.fsum((part.high - part.mean) ** 2 for part in parts)) / len(parts)
    return Estimates(Estimate(mean, *_bounded(mean - below, mean + above, shares), len(values)), found)


def _of_task(values: Sequence[float], shares: bool) -> Estimate:
    from scipy import stats

    count = len(values)
    mean = math.fsum(values) / count
    if shares and all(value in (0.0, 1.0) for value in values):
        return Estimate(mean, *wilson(round(math.fsum(values)), count), count)
    if count == 1:
        return Estimate(mean, *_bounded(-math.inf, math.inf, shares), count)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    half = float(stats.t.ppf(0.975, count - 1)) * deviation / math.sqrt(count)
    return Estimate(mean, *_bounded(mean - half, mean + half, shares), count)


def _bounded(low: float, high: float, shares: bool) -> tuple[float, float]:
    return (max(0.0, low), min(1.0, high)) if shares else (low, high)
