# SPDX-License-Identifier: Apache-2.0
"""A ratio of two sums, and its variance by the delta method, clustered by unit.

Source: Deng, Knoblich, Lu, "Applying the Delta Method in Metric Analytics", KDD 2018 (arXiv 1803.06336), §3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_merge.experiments.statistics.sums import Sums


@dataclass(frozen=True)
class Estimate:
    """A value with its variance (of the value, not of a unit), from so many units. Numbers, or arrays of one shape."""

    value: Any
    variance: Any
    units: Any


def ratio(sums: Sums) -> Estimate:
    """R = Σx / Σd, and Var R = Var(x − R·d) / (n · d̄²). NaN where there are fewer than two units or Σd = 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        value = np.divide(sums.x, sums.d)
        # Σ(x − R·d) = 0, so the sum of squares needs no mean taken off.
        squares = np.maximum(sums.xx - 2 * value * sums.xd + value**2 * sums.dd, 0.0)
        mean = np.divide(sums.d, sums.units)
        variance = np.divide(squares, (sums.units - 1) * sums.units * mean**2)
    return Estimate(value, np.where(np.asarray(sums.units) > 1, variance, np.nan)[()], sums.units)


def contrast(arm: Estimate, control: Estimate, factor: float = 1.0) -> Estimate:
    """arm − factor · control, of independent arms."""
    variance = arm.variance + factor**2 * control.variance
    return Estimate(arm.value - factor * control.value, variance, arm.units + control.units)


def lift(arm: Estimate, control: Estimate) -> Estimate:
    """arm / control − 1 (delta method: Var = (V_arm + (R_arm / R_control)² · V_control) / R_control²)."""
    with np.errstate(invalid="ignore", divide="ignore"):
        quotient = np.divide(arm.value, control.value)
        variance = (arm.variance + quotient**2 * control.variance) / np.square(control.value)
    return Estimate(quotient - 1, variance, arm.units + control.units)
