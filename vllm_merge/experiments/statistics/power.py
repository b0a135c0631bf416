# SPDX-License-Identifier: Apache-2.0
"""How many units a comparison of two arms needs, and what it can see with those it has.

With units of standard deviation σ_1 and σ_0, n in each arm and a true difference δ, the estimate has SE = √((σ_1² + σ_0²) / n). One look at the
end finds δ with power Φ(|δ|/SE − z_(1−α/2)) (Cohen 1988). Looking all the time asks for more: the confidence sequence of `sequence`
after 2n units is k(2n) standard errors wide on each side, so that at n the power is at least Φ(|δ|/SE − k(2n)), and more for having
looked before.
"""

from __future__ import annotations

import math

from scipy.stats import norm

from vllm_merge.experiments.statistics.sequence import ALPHA, MIN_UNITS, standard_errors

_MOST_UNITS = 1e12


def units_for_one_look(effect: float, variance: float, power: float = 0.8, alpha: float = ALPHA) -> int:
    """Units in each arm for one look. variance: σ_1² + σ_0². Two-sided; the wrong side's share is neglected."""
    errors = float(norm.ppf(1 - alpha / 2) + norm.ppf(power))
    return math.ceil(errors**2 * variance / effect**2)


def power_when_watched(units: float, effect: float, variance: float, alpha: float = ALPHA) -> float:
    """The least power with so many units in each arm, looked at as often as one likes."""
    if units < MIN_UNITS:
        return 0.0
    return float(norm.cdf(abs(effect) / math.sqrt(variance / units) - standard_errors(2 * units, alpha)))


def units_when_watched(effect: float, variance: float, power: float = 0.8, alpha: float = ALPHA) -> int | None:
    """Units in each arm with which that power is reached; None where no number of units is enough."""
    low, high = MIN_UNITS, MIN_UNITS
    while power_when_watched(high, effect, variance, alpha) < power:
        low, high = high, 2 * high
        if high > _MOST_UNITS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        enough = power_when_watched(middle, effect, variance, alpha) >= power
        low, high = (low, middle) if enough else (middle, high)
    return high
