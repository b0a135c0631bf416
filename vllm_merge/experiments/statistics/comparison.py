# SPDX-License-Identifier: Apache-2.0
"""An arm, and an arm against control: values with intervals that hold at all times at once.

What is no share has an interval (`sequence`) once there are MIN_UNITS units in each arm. Shares (of requests that fail, of thumbs up) have
one from the first unit on: that of `proportion`, with as many trials as there are in effect. The n_i requests of a unit tell at least
as much as one and at most as much as n_i, so there are Σd / e, with e between 1 and Σd² / Σd: the variance by units over that by
requests, and the largest possible while units are few (Kish, Survey Sampling, 1965, §8.2). A difference of shares is that of two
such intervals until both arms have MIN_UNITS units, MIN_EVENTS of one kind and as many of the other: then `sequence` is narrower.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_merge.experiments.statistics.cuped import adjusted
from vllm_merge.experiments.statistics.estimate import Estimate, contrast, lift
from vllm_merge.experiments.statistics.proportion import difference_interval, share_interval
from vllm_merge.experiments.statistics.sequence import ALPHA, MIN_UNITS, MIN_UNITS_ALONE, Interval, interval, p_value
from vllm_merge.experiments.statistics.sums import Sums

EARLY = 0.2  # the part of alpha that differences of shares may use up before then
MIN_EVENTS = 10


@dataclass(frozen=True)
class Arm:
    """One arm of one metric: its sums and its value. Numbers, or arrays over time."""

    sums: Sums
    estimate: Estimate
    share: bool

    def interval(self, alpha: float = ALPHA, least: int = MIN_UNITS_ALONE) -> Interval:
        """Of the value; of what is no share, once there are `least` units."""
        if self.share:
            trials = _trials(self.sums, self.estimate)
            return share_interval(np.nan_to_num(self.estimate.value) * trials, trials, alpha)
        return _where(np.asarray(self.sums.units) >= least, interval(self.estimate, alpha), NOTHING_KNOWN)

    @property
    def ready(self) -> Any:
        """Whether its estimate is near enough to a normal one."""
        enough = np.asarray(self.sums.units) >= MIN_UNITS
        if not self.share:
            return enough
        trials = _trials(self.sums, self.estimate)
        return enough & (trials * np.minimum(self.estimate.value, 1 - self.estimate.value) >= MIN_EVENTS)


NOTHING_KNOWN = Interval(-np.inf, np.inf)


def arms_of(sums: Mapping[str, Sums], *, share: bool) -> tuple[dict[str, Arm], float]:
    """Every arm's value with the past taken out, and the part of the variance that this takes away (`cuped`)."""
    estimates, saved = adjusted(sums)
    return {arm: Arm(found, estimates[arm], share) for arm, found in sums.items()}, saved


def difference(arm: Arm, control: Arm, alpha: float = ALPHA, factor: float = 1.0) -> Interval:
    """Of arm − factor · control."""
    ready = arm.ready & control.ready
    if not arm.share:
        return _where(ready, interval(contrast(arm.estimate, control.estimate, factor), alpha), NOTHING_KNOWN)
    late = interval(contrast(arm.estimate, control.estimate, factor), (1 - EARLY) * alpha)
    each = EARLY * alpha / 2
    mine, theirs = arm.interval(each), control.interval(each)
    return _where(ready, late, difference_interval(mine, Interval(factor * theirs.low, factor * theirs.high)))


def no_difference(arm: Arm, control: Arm) -> Any:
    """The always-valid p-value of "both are the same"; 1 before the estimates are near enough to normal ones."""
    p = p_value(contrast(arm.estimate, control.estimate))
    p = np.minimum(1.0, p / (1 - EARLY)) if arm.share else p
    return np.where(arm.ready & control.ready, p, 1.0)[()]


def lift_interval(arm: Arm, control: Arm, alpha: float = ALPHA) -> Interval:
    """Of arm / control − 1."""
    found = interval(lift(arm.estimate, control.estimate), alpha)
    return _where(arm.ready & control.ready, found, NOTHING_KNOWN)


def _trials(sums: Sums, estimate: Estimate) -> Any:
    """How many independent requests say as much as these."""
    with np.errstate(invalid="ignore", divide="ignore"):
        largest = np.maximum(np.divide(sums.dd, sums.d), 1.0)
        by_requests = np.divide(estimate.value * (1 - estimate.value), sums.d)
        measured = np.where(by_requests > 0, np.divide(estimate.variance, by_requests), np.inf)
        effect = np.where(np.asarray(sums.units) >= MIN_UNITS, np.clip(measured, 1.0, largest), largest)
        return np.nan_to_num(sums.d / effect)


def _where(condition: Any, first: Interval, second: Interval) -> Interval:
    return Interval(np.where(condition, first.low, second.low)[()], np.where(condition, first.high, second.high)[()])
