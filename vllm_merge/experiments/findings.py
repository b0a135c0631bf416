# SPDX-License-Identifier: Apache-2.0
"""What one metric says about every arm, in plain numbers: what reports, plots and verdicts are made of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from vllm_merge.experiments.measures import Kind
from vllm_merge.experiments.statistics.comparison import Arm, arms_of, difference, lift_interval, no_difference
from vllm_merge.experiments.statistics.correction import holm, shared_alpha
from vllm_merge.experiments.statistics.sequence import ALPHA
from vllm_merge.experiments.statistics.sums import Sums

Better = Literal["increase", "decrease"]


@dataclass(frozen=True)
class Value:
    """One arm: its value and the interval of it. None: nothing can be said yet."""

    arm: str
    units: int
    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Difference:
    """An arm − control: intervals that hold for all arms together at 1 − alpha, and whenever they are looked at.

    lift: the difference as a share of control. p: always valid; adjusted: by Holm over the arms. state: better and worse are
    said where the interval leaves 0 on one side, unknown otherwise.
    """

    arm: str
    difference: float | None
    low: float | None
    high: float | None
    lift: float | None
    lift_low: float | None
    lift_high: float | None
    p: float
    adjusted: float
    state: Literal["better", "worse", "different", "unknown"]


@dataclass(frozen=True)
class Finding:
    """One metric. variance_saved: by CUPED, 0 where there is no past."""

    metric: str
    kind: Kind
    label: str
    direction: Better | None
    control: str
    values: list[Value]
    differences: list[Difference]
    variance_saved: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def finding(
    metric: str,
    kind: Kind,
    label: str,
    direction: Better | None,
    control: str,
    sums: Mapping[str, Sums],
    alpha: float = ALPHA,
) -> Finding:
    """What sums over units (numbers, not courses) say. control must be among the arms."""
    arms, saved = arms_of(sums, share=kind == "share")
    others = [arm for arm in arms if arm != control]
    level = shared_alpha(alpha, len(others))
    p_values = [float(no_difference(arms[arm], arms[control])) for arm in others]
    differences = [
        _difference(arm, arms[arm], arms[control], level, p, corrected, direction)
        for arm, p, corrected in zip(others, p_values, holm(p_values), strict=True)
    ]
    values = [_value(name, arm, alpha) for name, arm in arms.items()]
    return Finding(metric, kind, label, direction, control, values, differences, saved)


def _value(name: str, arm: Arm, alpha: float) -> Value:
    found = arm.interval(alpha)
    return Value(name, int(arm.sums.units), finite(arm.estimate.value), finite(found.low), finite(found.high))


def _difference(
    name: str, arm: Arm, control: Arm, alpha: float, p: float, corrected: float, direction: Better | None
) -> Difference:
    found, relative = difference(arm, control, alpha), lift_interval(arm, control, alpha)
    here = finite(arm.estimate.value), finite(control.estimate.value)
    plain = here[0] - here[1] if here[0] is not None and here[1] is not None else None
    return Difference(
        name,
        plain,
        finite(found.low),
        finite(found.high),
        plain / here[1] if plain is not None and here[1] else None,
        finite(relative.low),
        finite(relative.high),
        p,
        corrected,
        _state(found.low, found.high, direction),
    )


def _state(low: float, high: float, direction: Better | None) -> Literal["better", "worse", "different", "unknown"]:
    if low <= 0 <= high:
        return "unknown"
    if direction is None:
        return "different"
    return "better" if (low > 0) == (direction == "increase") else "worse"


def finite(value: Any) -> float | None:
    """A number, or None for what JSON has no number for."""
    return float(value) if value is not None and math.isfinite(value) else None
