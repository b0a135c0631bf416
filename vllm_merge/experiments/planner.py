# SPDX-License-Identifier: Apache-2.0
"""Before an experiment: how many units it needs, and how long that takes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vllm_merge.errors import UserInputError
from vllm_merge.experiments.statistics.comparison import EARLY
from vllm_merge.experiments.statistics.correction import shared_alpha
from vllm_merge.experiments.statistics.power import units_for_one_look, units_when_watched
from vllm_merge.experiments.statistics.sequence import ALPHA


@dataclass(frozen=True)
class Baseline:
    """What control does today: its mean, and the standard deviation of one unit around it. share: of a yes or no."""

    mean: float
    deviation: float
    share: bool = False

    @classmethod
    def of_share(cls, share: float) -> Baseline:
        """A yes or no of each unit. Raises UserInputError."""
        if not 0 < share < 1:
            raise UserInputError(f"the share is {share:g}; give one between 0 and 1, without both")
        return cls(share, math.sqrt(share * (1 - share)), share=True)

    @classmethod
    def of_mean(cls, mean: float, deviation: float) -> Baseline:
        """Raises UserInputError."""
        if not deviation > 0 or not math.isfinite(mean):
            raise UserInputError(f"the mean is {mean:g} and the deviation {deviation:g}; the deviation must be above 0")
        return cls(mean, deviation)

    def with_effect(self, effect: float) -> Baseline:
        """Of an arm that is so much above. Raises UserInputError where no share is left."""
        return Baseline.of_share(self.mean + effect) if self.share else Baseline(self.mean + effect, self.deviation)


@dataclass(frozen=True)
class Plan:
    """effect: the smallest difference to be found. units: in each arm, if watched all the time; one_look: if looked at once, at
    the end. total: over all arms. days: None without a rate.
    """

    baseline: Baseline
    effect: float
    arms: int
    power: float
    alpha: float
    units: int
    one_look: int
    total: int
    days: float | None


def plan(
    baseline: Baseline,
    effect: float,
    arms: int = 2,
    power: float = 0.8,
    alpha: float = ALPHA,
    units_per_day: float | None = None,
) -> Plan:
    """Plan an experiment with arms of equal weight. effect: absolute, either way. Raises UserInputError."""
    if not math.isfinite(effect) or effect == 0:
        raise UserInputError("the effect is 0; give the smallest difference that matters")
    if not 0 < power < 1 or not 0 < alpha < 1:
        raise UserInputError(f"power is {power:g} and alpha {alpha:g}; both lie between 0 and 1")
    if arms < 2:
        raise UserInputError(f"{arms} arms; an experiment has at least two")
    if units_per_day is not None and not units_per_day > 0:
        raise UserInputError(f"{units_per_day:g} units a day; give a number above 0")
    variance = baseline.deviation**2 + baseline.with_effect(effect).deviation ** 2
    level = shared_alpha(alpha, arms - 1)
    late = (1 - EARLY) * level if baseline.share else level  # see `comparison`
    units = units_when_watched(effect, variance, power, late)
    if units is None:
        raise UserInputError(f"an effect of {effect:g} is too small for any number of units")
    total = units * arms
    days = total / units_per_day if units_per_day is not None else None
    one_look = units_for_one_look(effect, variance, power, level)
    return Plan(baseline, effect, arms, power, alpha, units, one_look, total, days)
