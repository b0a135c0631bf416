# SPDX-License-Identifier: Apache-2.0
"""Sample-ratio mismatch: do the arms have the units that their weights say? If not, something is broken and no figure counts.

Chi-square for one look (Fabijan et al., KDD 2019). For any number of looks the Dirichlet-multinomial mixture of Lindon, Malek, "Anytime-
valid inference for multinomial count data", NeurIPS 2022 (arXiv 2011.03567), §3: with shares θ and prior Dirichlet(kθ)

    M = Γ(k)/Γ(k + t) · Π_i Γ(kθ_i + n_i)/Γ(kθ_i) / Π_i θ_i^n_i

exceeds 1/α at any time with probability α at most, so 1/M is an always-valid p-value.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import gammaln
from scipy.stats import chisquare

from vllm_merge.experiments.statistics.sums import Array

MISMATCH = 0.001  # the p-value under which results are not to be read
_PRIOR_WEIGHT = 1000.0  # k; large: mismatches that matter are of a few per cent


@dataclass(frozen=True)
class Imbalance:
    """units and expected: by arm. once: the chi-square p-value of this look alone; always: valid at every look."""

    units: Array
    expected: Array
    once: float
    always: float

    @property
    def mismatch(self) -> bool:
        return self.always < MISMATCH


def imbalance(units: ArrayLike, weights: ArrayLike) -> Imbalance:
    """Units by arm against weights by arm (any scale; an arm of weight 0 must have no units)."""
    counts = np.asarray(units, dtype=np.float64)
    shares = np.asarray(weights, dtype=np.float64)
    shares = shares / shares.sum()
    total, open_ = counts.sum(), shares > 0
    if counts[~open_].any():  # units where none may be
        return Imbalance(counts, shares * total, 0.0, 0.0)
    if total == 0 or open_.sum() < 2:
        return Imbalance(counts, shares * total, 1.0, 1.0)
    once = float(chisquare(counts[open_], shares[open_] * total).pvalue)
    always = float(np.exp(min(0.0, -float(log_evidence(counts[open_], shares[open_])))))
    return Imbalance(counts, shares * total, once, always)


def log_evidence(counts: Array, shares: Array) -> Array:
    """ln M of counts (…, arms) against shares (arms,)."""
    k, total = _PRIOR_WEIGHT, counts.sum(-1)
    mixed = gammaln(k) - gammaln(k + total) + (gammaln(k * shares + counts) - gammaln(k * shares)).sum(-1)
    return np.asarray(mixed - (counts * np.log(shares)).sum(-1), dtype=np.float64)
