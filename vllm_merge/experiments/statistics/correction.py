# SPDX-License-Identifier: Apache-2.0
"""Several arms against one control: what one comparison may get wrong is shared among all of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def shared_alpha(alpha: float, comparisons: int) -> float:
    """Bonferroni: intervals at this level hold all together with probability 1 − alpha."""
    return alpha / max(1, comparisons)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values (Holm, Scand. J. Statist. 6, 1979): in rising order p_(i) · (k − i + 1), never falling, at most 1."""
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1.0)
    return [float(value) for value in adjusted]
