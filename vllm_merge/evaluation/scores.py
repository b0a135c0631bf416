# SPDX-License-Identifier: Apache-2.0
"""Accuracies with 95 % intervals."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vllm_merge.evaluation.tasks import Example

Z = 1.959963984540054  # of a two-sided 95 % interval


def wilson(right: int, total: int) -> tuple[float, float]:
    """Wilson's score interval of a proportion (JASA 22, 1927)."""
    share = right / total
    centre = share + Z**2 / (2 * total)
    half = Z * math.sqrt(share * (1 - share) / total + Z**2 / (4 * total**2))
    scale = 1 + Z**2 / total
    # At 0 and total the bound is the share itself; rounding must not put it beyond.
    return min(share, max(0.0, (centre - half) / scale)), max(share, min(1.0, (centre + half) / scale))


@dataclass(frozen=True, slots=True)
class Score:
    """An accuracy and its interval [low, high]; `right` of `total` answers."""

    accuracy: float
    low: float
    high: float
    right: int
    total: int

    def in_words(self) -> str:
        """In per cent: 62 (45–77)."""
        return f"{100 * self.accuracy:.0f} ({100 * self.low:.0f}–{100 * self.high:.0f})"


@dataclass(frozen=True)
class Scores:
    """What one model got right: by task, and the mean of the tasks, each counting alike."""

    name: str
    kind: str
    tasks: dict[str, Score]
    mean: Score

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)


def score(name: str, kind: str, examples: Sequence[Example], answers: Iterable[str]) -> Scores:
    """Compare the answers, one per example in order.

    The mean's interval combines those of the tasks (Zou and Donner, Statistics in Medicine 27, 2008).
    """
    counts: dict[str, list[int]] = {}
    for example, text in zip(examples, answers, strict=True):
        counts.setdefault(example.task, []).append(example.is_right(text))
    tasks = {}
    for task, marks in counts.items():
        low, high = wilson(sum(marks), len(marks))
        tasks[task] = Score(sum(marks) / len(marks), low, high, sum(marks), len(marks))
    parts = list(tasks.values())
    mean = sum(part.accuracy for part in parts) / len(parts)
    below = math.sqrt(sum((part.accuracy - part.low) ** 2 for part in parts)) / len(parts)
    above = math.sqrt(sum((part.high - part.accuracy) ** 2 for part in parts)) / len(parts)
    right, total = sum(part.right for part in parts), sum(part.total for part in parts)
    return Scores(name, kind, tasks, Score(mean, max(0.0, mean - below), min(1.0, mean + above), right, total))
