# SPDX-License-Identifier: Apache-2.0
"""Confidence sequences: intervals that hold at all times at once, so that looking early or often is no mistake.

Asymptotic confidence sequences of Waudby-Smith, Arbour, Sinha, Kennedy, Ramdas (arXiv 2103.06476), Theorem 2.2: after t units with
variance σ² each, the mean is, with probability 1 − α for all t together, within

    σ · √( 2 (tρ² + 1) / (t²ρ²) · ln( √(tρ² + 1) / α ) )

of its estimate. It is the boundary of a normal mixture (mSPRT). ρ says after how many units it is tightest (exactly: Howard, Ramdas,
McAuliffe, Sekhon, "Time-uniform, nonparametric, nonasymptotic confidence sequences", Ann. Statist. 49, 2021, Prop. 3), and is
fixed beforehand. Being asymptotic it needs a few units to begin with: there is no interval before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import lambertw

from vllm_merge.experiments.statistics.estimate import Estimate

ALPHA = 0.05
TIGHTEST_AT = 1000  # units; with a tenth or the hundredfold of it the interval is a quarter wider, in standard errors
MIN_UNITS = 50  # in each of two arms that are compared
# For an arm alone: a long tail, as of lognormal lengths, is not cancelled by that of another arm, and after 50 units the
# interval's upper end is below the true mean too often (benchmarks/experiment_statistics.py).
MIN_UNITS_ALONE = 400


@dataclass(frozen=True)
class Interval:
    """Both ends; infinite where nothing can be said yet. Numbers or arrays."""

    low: Any
    high: Any


def rho_squared(alpha: float = ALPHA, tightest_at: float = TIGHTEST_AT) -> float:
    """ρ² of the tightest interval after t units: t·ρ² = −W₋₁(−α²/e) − 1, with Lambert's W."""
    return float((-lambertw(-(alpha**2) / np.e, -1).real - 1) / tightest_at)


def standard_errors(units: Any, alpha: float = ALPHA) -> Any:
    """Half the width of the interval after `units` units, in standard errors of the estimate (its σ / √t)."""
    information = np.asarray(units, dtype=np.float64) * rho_squared(alpha)  # tρ²
    return np.sqrt(2 * (information + 1) / information * np.log(np.sqrt(information + 1) / alpha))


def interval(estimate: Estimate, alpha: float = ALPHA) -> Interval:
    """The (1 − α) confidence sequence around an estimate, as far as it has come."""
    with np.errstate(invalid="ignore", divide="ignore"):
        radius = standard_errors(estimate.units, alpha) * np.sqrt(estimate.variance)
    radius = np.where(np.isfinite(radius), radius, np.inf)[()]
    value = np.nan_to_num(estimate.value)
    return Interval(value - radius, value + radius)


def p_value(estimate: Estimate, alpha: float = ALPHA) -> Any:
    """The always-valid p of "it is 0": min(1, √(tρ² + 1) · exp(−z² tρ² / (2 (tρ² + 1)))), z = value / standard error.

    The level at which the interval would just reach 0, with ρ as it is for `alpha`. 1 where nothing can be said.
    """
    information = np.asarray(estimate.units, dtype=np.float64) * rho_squared(alpha)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        z2 = np.square(estimate.value) / estimate.variance
        found = np.sqrt(information + 1) * np.exp(-z2 * information / (2 * (information + 1)))
    return np.where(np.isnan(found), 1.0, np.minimum(found, 1.0))[()]
