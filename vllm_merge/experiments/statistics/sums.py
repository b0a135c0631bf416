# SPDX-License-Identifier: Apache-2.0
"""Sums over units: all that a ratio, its variance and a covariate need.

A unit i (a user, a session, a request) has a numerator x_i and a denominator d_i: tokens and answers, errors and requests, the sum
of its scores and their number. A mean over units has d_i = 1. Units are independent; what one unit does again and again is not,
so nothing here counts requests.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Sums:
    """Sums over the units of one arm, float64, each an array of any one shape (or a number).

    units: how many; x, d, xx, dd, xd: Σx_i, Σd_i, Σx_i², Σd_i², Σx_i·d_i.
    m, c, cc, cx, cd, mx, md: the same of a covariate c_i from before the experiment, over the units that have one (m_i = 1):
    Σm_i, Σc_i, Σc_i², Σc_i·x_i, Σc_i·d_i, Σm_i·x_i, Σm_i·d_i.
    """

    units: Any
    x: Any
    d: Any
    xx: Any
    dd: Any
    xd: Any
    m: Any = 0.0
    c: Any = 0.0
    cc: Any = 0.0
    cx: Any = 0.0
    cd: Any = 0.0
    mx: Any = 0.0
    md: Any = 0.0

    @classmethod
    def of(cls, x: ArrayLike, d: ArrayLike = 1.0, c: ArrayLike | None = None) -> Sums:
        """Sums over the last axis. c: covariates, NaN for units without one."""
        x = np.asarray(x, dtype=np.float64)
        d = np.broadcast_to(np.asarray(d, dtype=np.float64), x.shape)
        made = cls(np.float64(x.shape[-1]), *(v.sum(-1) for v in (x, d, x * x, d * d, x * d)))
        if c is None:
            return made
        c = np.asarray(c, dtype=np.float64)
        m = np.isfinite(c).astype(np.float64)
        c = np.where(m > 0, c, 0.0)
        return cls(*made.values()[:6], *(v.sum(-1) for v in (m, c, c * c, c * x, c * d, m * x, m * d)))

    def values(self) -> tuple[Any, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))

    def __add__(self, other: Sums) -> Sums:
        return Sums(*(mine + theirs for mine, theirs in zip(self.values(), other.values(), strict=True)))

    def total(self) -> Sums:
        """Of sums along an axis of time, those over all of it."""
        return Sums(*(np.sum(value, axis=-1) if np.ndim(value) else value for value in self.values()))

    def cumulative(self) -> Sums:
        """Of sums along an axis of time, the sums up to each point of it (the last axis)."""
        return Sums(*(np.cumsum(value, axis=-1) if np.ndim(value) else value for value in self.values()))
