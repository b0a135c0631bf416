# SPDX-License-Identifier: Apache-2.0
"""CUPED: take out of each unit's figure what was known about it before the experiment. Same expectation, less noise.

Deng, Xu, Kohavi, Walker, "Improving the sensitivity of online controlled experiments by utilizing pre-experiment data", WSDM 2013, §3;
for ratios, on their linear part (x_i − R·d_i) / d̄. Units without a past get the mean of the others, which changes nothing for them.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from vllm_merge.experiments.statistics.estimate import Estimate, ratio
from vllm_merge.experiments.statistics.sums import Array, Sums


def adjusted(arms: Mapping[str, Sums]) -> tuple[dict[str, Estimate], float]:
    """The ratio of every arm with the past taken out, and the share of variance that this takes away.

    With z_i = c_i − c̄ (0 for units without c) and ψ_i = (x_i − R·d_i) / d̄: R − θ·z̄, with the pooled θ = Cov(ψ, z) / Var(z), has
    Var = Var(ψ − θ·z) / n. Where no unit has a past, or all the same one, the plain ratios and 0.
    """
    plain = {arm: ratio(sums) for arm, sums in arms.items()}
    with_past = sum(np.max(sums.m) for sums in arms.values())
    if with_past < 2:
        return plain, 0.0
    mean = sum(s.c for s in arms.values()) / np.maximum(sum(s.m for s in arms.values()), 1.0)
    moments = {arm: _moments(sums, plain[arm], mean) for arm, sums in arms.items()}
    zz = sum(m[2] for m in moments.values())
    pz = sum(m[1] for m in moments.values())
    theta = np.divide(pz, zz, out=np.zeros_like(np.asarray(zz)), where=np.asarray(zz) > 0)[()]
    made, before, after = {}, 0.0, 0.0
    for arm, sums in arms.items():
        pp, cross, past, z = moments[arm]
        squares = np.maximum(pp - 2 * theta * cross + theta**2 * past, 0.0)
        scale = np.maximum(sums.units - 1, 1) * np.maximum(sums.units, 1)
        made[arm] = Estimate(plain[arm].value - theta * z, squares / scale, sums.units)
        before, after = before + np.ravel(pp)[-1], after + np.ravel(squares)[-1]
    return made, float(1 - after / before) if before > 0 else 0.0


def _moments(sums: Sums, plain: Estimate, mean: Array) -> tuple[Array, Array, Array, Array]:
    """Centred sums of ψψ, ψz and zz over an arm's units, and its mean z."""
    n = sums.units
    with np.errstate(invalid="ignore", divide="ignore"):
        per_unit = sums.d / n
        z = sums.c - mean * sums.m  # Σz
        pp = (sums.xx - 2 * plain.value * sums.xd + plain.value**2 * sums.dd) / per_unit**2
        zx, zd = sums.cx - mean * sums.mx, sums.cd - mean * sums.md
        pz = (zx - plain.value * zd) / per_unit  # Σψ = 0: no means to take off
        zz = sums.cc - 2 * mean * sums.c + mean**2 * sums.m - z**2 / n
        return np.nan_to_num(pp), np.nan_to_num(pz), np.nan_to_num(zz), np.nan_to_num(z / n)
