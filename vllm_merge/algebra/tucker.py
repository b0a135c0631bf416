# SPDX-License-Identifier: Apache-2.0
"""Tucker-2: one pair of bases for several matrices, by higher-order orthogonal iteration (HOOI).

Finds orthonormal U, V of k columns that maximise Σ ‖Uᵀ M_i V‖²_F, started from the singular vectors of the matrices side
by side and on top of each other (De Lathauwer, De Moor, Vandewalle, SIAM J. Matrix Anal. Appl. 21, 2000).
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_merge.algebra.bases import TOLERANCE
from vllm_merge.algebra.subspace import LeadingVectors

MAX_ITERATIONS = 1000
LEAST_ITERATIONS = 3


def shared_bases(
    left: Tensor, right: Tensor, same_task: Tensor, ranks: Tensor, tolerance: float
) -> tuple[Tensor, Tensor]:
    """U (modules, rows, k) and V (modules, cols, k) for tasks M_i = left_i @ right_i, k = max ranks, strongest first.

    left: (modules, rows, K), right: (modules, K, cols), float64; same_task: (K, K), 1 where both columns of left are of
    one task, else 0. A module stops when the error ‖M − U Uᵀ M V Vᵀ‖ / ‖M‖ of all its tasks changes by less than
    tolerance. Columns beyond its rank, ranks (modules,), or outside the support are zero.
    """
    squares = ((left.mT @ left) * (right @ right.mT) * same_task).sum((-1, -2))
    width = int(ranks.max())
    of_left, of_right = LeadingVectors(width), LeadingVectors(width)
    everyone = torch.arange(len(ranks), device=ranks.device)
    u, _ = _supported(*of_left.of(_outer(left, right @ right.mT, same_task), everyone), ranks)
    v, _ = _supported(*of_right.of(_outer(right.mT, left.mT @ left, same_task), everyone), ranks)
    error = torch.full_like(squares, torch.inf)
    open_ = squares.nonzero()[:, 0]
    for iteration in range(MAX_ITERATIONS):
        if not len(open_):
            break
        some_left, some_right, some_ranks = left[open_], right[open_], ranks[open_]
        inner = some_right @ v[open_]
        outer = _outer(some_left, inner @ inner.mT, same_task)
        u[open_] = some_u = _supported(*of_left.of(outer, open_), some_ranks)[0]
        inner = some_left.mT @ some_u
        outer = _outer(some_right.mT, inner @ inner.mT, same_task)
        v[open_], kept = _supported(*of_right.of(outer, open_), some_ranks)
        now = (1 - kept / squares[open_]).clamp_min(0).sqrt()
        going = (error[open_] - now).abs() >= tolerance
        error[open_] = now
        if iteration + 1 >= LEAST_ITERATIONS:
            open_ = open_[going]
    return u, v


def _outer(side: Tensor, inner: Tensor, same_task: Tensor) -> Tensor:
    """Σ_i side_i inner_ii side_iᵀ, (modules, d, d)."""
    return side @ (inner * same_task) @ side.mT


def _supported(values: Tensor, vectors: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor]:
    """The eigenvectors (modules, d, width), zero outside the support and beyond the rank, and the sum of their eigenvalues."""
    support = (values > TOLERANCE**2 * values[:, :1]) & (
        torch.arange(values.shape[1], device=ranks.device) < ranks[:, None]
    )
    return vectors * support[:, None, :], (values * support).sum(-1)
