# SPDX-License-Identifier: Apache-2.0
"""Sign election as mergekit and PEFT do it: the sign of the sum, plus where the sum is exactly 0."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_merge.methods.ties import disjoint_merge


def merge_agreeing(weighted: Tensor, weight: Tensor, *, normalize: bool) -> Tensor:
    """Sum of the weighted values that have the elected sign, or their mean, weighted by |w_i|: (modules, rows, cols).

    weighted: (modules, n, rows, cols), used up; weight: (modules, n, 1, 1).
    """
    plus = weighted.new_ones(weighted.shape[0])
    return disjoint_merge(weighted, weighted.sum(1), weighted.abs().sum(1), weight, normalize, lambda: plus)


def agreeing(values: Tensor) -> Tensor:
    """Which values have the sign of their sum over the tasks, (modules, n, rows, cols) bool; zeros never do."""
    elected = torch.where(values.sum(1, keepdim=True) >= 0, 1.0, -1.0)
    return values * elected > 0
