# SPDX-License-Identifier: Apache-2.0
"""Quantiles of latencies: confidence sequences from ranks, with no assumption on the shape.

Howard, Ramdas, "Sequential estimation of quantiles", Bernoulli 28 (2022; arXiv 1906.09712), Theorem 1: of t latencies, the number
that is at most the true p-quantile is a sum of Bernoulli(p) variables, for which the beta-binomial mixture (`proportion`) with a
Beta(rp, r(1 − p)) prior is a martingale. The ranks at which it stays under 1/α bound the quantile.

Latencies of one unit resemble each other. As many independent ones as there are in effect are t / (1 + (m − 1)·ICC), with
m = Σn_i² / Σn_i and the intraclass correlation of their logarithms (Kish, Survey Sampling, 1965, §5.4; ANOVA estimator, Donner
1986): for the event "slower than a quantile" the correlation is smaller, so the interval is rather too wide.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vllm_merge.experiments.statistics.proportion import log_evidence
from vllm_merge.experiments.statistics.sequence import ALPHA, TIGHTEST_AT, Interval, rho_squared
from vllm_merge.experiments.statistics.sums import Array

_STEPS = 60  # halvings
# The prior's weight in latencies: such that its variance is p(1 − p)ρ², that of the normal mixture with the same aim.
_PRIOR_WEIGHT = 1 / rho_squared(ALPHA, TIGHTEST_AT) - 1


@dataclass(frozen=True)
class Clusters:
    """Sums over units that measured n_i latencies with logarithms of sum s_i.

    units: how many; n: Σn_i; nn: Σn_i²; s: Σs_i; between: Σs_i²/n_i; squares: the sum of all squared logarithms.
    """

    units: float
    n: float
    nn: float
    s: float
    between: float
    squares: float


def design_effect(clusters: Clusters) -> float:
    """How many latencies of these say as much as one independent one; at least 1."""
    k, n = clusters.units, clusters.n
    if k < 2 or n <= k:
        return 1.0
    mean_square_between = (clusters.between - clusters.s**2 / n) / (k - 1)
    mean_square_within = max(clusters.squares - clusters.between, 0.0) / (n - k)
    typical = (n - clusters.nn / n) / (k - 1)
    total = mean_square_between + (typical - 1) * mean_square_within
    correlation = (mean_square_between - mean_square_within) / total if total > 0 else 1.0
    return 1 + (clusters.nn / n - 1) * min(max(correlation, 0.0), 1.0)


def rank_shares(quantile: float, latencies: float, alpha: float = ALPHA) -> Interval:
    """Which shares of `latencies` independent latencies (a number, not necessarily whole) may lie below the quantile."""
    a, b = _PRIOR_WEIGHT * quantile, _PRIOR_WEIGHT * (1 - quantile)

    def outside(share: float) -> bool:
        return bool(log_evidence(share * latencies, latencies, quantile, a, b) >= -np.log(alpha))

    ends = []
    for end in (0.0, 1.0):  # ln M is convex in the count: one crossing on each side of the expected one
        inner, outer = quantile, end
        if not outside(outer):
            ends.append(outer)
            continue
        for _ in range(_STEPS):
            middle = (inner + outer) / 2
            inner, outer = (inner, middle) if outside(middle) else (middle, outer)
        ends.append(outer)
    return Interval(*ends)


def quantile_interval(
    edges: Array, counts: Array, quantile: float, effect: float = 1.0, alpha: float = ALPHA
) -> tuple[float, Interval]:
    """A quantile of binned latencies, and its (1 − α) confidence sequence.

    edges: (bins + 1,) rising; counts: (bins,). effect: the design effect. The value is the geometric middle of its bin; the
    interval's ends are edges, outwards; the upper one is infinite while the slowest latencies may still be below the quantile.
    """
    total = float(counts.sum())
    if total == 0:
        return float("nan"), Interval(0.0, float("inf"))
    shares = np.cumsum(counts) / total
    here = int(np.searchsorted(shares, quantile))
    allowed = rank_shares(quantile, total / effect, alpha)
    # The share below the quantile is more than allowed.low: so the quantile is not below the bin that holds that rank.
    low = float(edges[np.searchsorted(shares, allowed.low, side="right")]) if allowed.low > 0 else 0.0
    above = int(np.searchsorted(shares, allowed.high))
    high = float(edges[above + 1]) if allowed.high < 1 and above < len(counts) else float("inf")
    return float(np.sqrt(edges[here] * edges[here + 1])), Interval(low, high)


def ratio_interval(arm: Interval, control: Interval) -> Interval:
    """Of arm / control, from an interval of each that holds with probability 1 − α/2."""
    low = arm.low / control.high if control.high > 0 else 0.0
    return Interval(low, arm.high / control.low if control.low > 0 else float("inf"))
