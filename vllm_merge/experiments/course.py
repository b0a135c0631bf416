# SPDX-License-Identifier: Apache-2.0
"""How a comparison came about: the difference and its interval after each step of time, as units came in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from vllm_merge.experiments.findings import finite
from vllm_merge.experiments.measures import Kind
from vllm_merge.experiments.readings import Course
from vllm_merge.experiments.statistics.comparison import arms_of, difference
from vllm_merge.experiments.statistics.correction import shared_alpha
from vllm_merge.experiments.statistics.sequence import ALPHA
from vllm_merge.experiments.statistics.sums import Sums


@dataclass(frozen=True)
class Line:
    """One arm − control after each step. at: seconds since the epoch; None: nothing can be said yet."""

    arm: str
    at: list[float]
    difference: list[float | None]
    low: list[float | None]
    high: list[float | None]


def lines(kind: Kind, control: str, sums: Mapping[str, Sums], course: Course, alpha: float = ALPHA) -> list[Line]:
    """A line for each arm but control. sums: {arm: sums over the units that came in each step}.

    The intervals are those that a report at that moment had: they hold at all of them together.
    """
    arms, _ = arms_of({arm: found.cumulative() for arm, found in sums.items()}, share=kind == "share")
    others = [arm for arm in arms if arm != control]
    level = shared_alpha(alpha, len(others))
    found = []
    for name in others:
        interval = difference(arms[name], arms[control], level)
        plain = np.broadcast_to(arms[name].estimate.value - arms[control].estimate.value, (course.steps,))
        ends = (np.broadcast_to(end, (course.steps,)) for end in (interval.low, interval.high))
        found.append(Line(name, course.ends(), *([finite(v) for v in values] for values in (plain, *ends))))
    return found
