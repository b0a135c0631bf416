# SPDX-License-Identifier: Apache-2.0
"""The share of units for which something holds: exact confidence sequences, from the first unit on.

Robbins (Ann. Math. Statist. 41, 1970): after t units of which s have it, for every true share p

    M = B(a + s, b + t − s) / B(a, b) / ( p^s (1 − p)^(t − s) )

is a martingale of mean 1 that exceeds 1/α at any time with probability α at most (Ville). The shares at which it does not are the
confidence sequence. a = b = ½.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import betaln, xlog1py, xlogy

from vllm_merge.experiments.statistics.sequence import ALPHA, Interval
from vllm_merge.experiments.statistics.sums import Array

_PRIOR = 0.5
_STEPS = 60  # halvings


def log_evidence(successes: Any, units: Any, share: Any, a: Any = _PRIOR, b: Any = _PRIOR) -> Array:
    """ln M of a share, after `units` units with `successes`."""
    failures = units - successes
    mixed = betaln(a + successes, b + failures) - betaln(a, b)
    return np.asarray(mixed - xlogy(successes, share) - xlog1py(failures, -share), dtype=np.float64)


def share_interval(successes: ArrayLike, units: ArrayLike, alpha: float = ALPHA) -> Interval:
    """The (1 − α) confidence sequence of a share. Shape: that of the arguments."""
    s, t = np.broadcast_arrays(np.asarray(successes, dtype=np.float64), np.asarray(units, dtype=np.float64))
    middle = np.divide(s, t, out=np.full(s.shape, 0.5), where=t > 0)

    def outside(share: Array) -> Any:
        return log_evidence(s, t, share) >= -np.log(alpha)

    # ln M is convex in p with its least value at s/t: one crossing on each side.
    return Interval(_crossing(outside, middle, np.zeros_like(s)), _crossing(outside, middle, np.ones_like(s)))


def difference_interval(arm: Interval, control: Interval) -> Interval:
    """Of arm − control, from an interval of each that holds with probability 1 − α/2: together they hold with 1 − α."""
    return Interval(arm.low - control.high, arm.high - control.low)


def _crossing(outside: Callable[[Array], Any], inner: Array, end: Array) -> Any:
    """Between a point that is inside and an end: where the outside begins; the end where that is inside too."""
    reached, outer = ~outside(end), end
    for _ in range(_STEPS):
        middle = (inner + outer) / 2
        beyond = outside(middle)
        inner, outer = np.where(beyond, inner, middle), np.where(beyond, middle, outer)
    return np.where(reached, end, outer)[()]
