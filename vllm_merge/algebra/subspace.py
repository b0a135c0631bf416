# SPDX-License-Identifier: Apache-2.0
"""Leading eigenvectors of matrices that change a little at a time, by subspace iteration with Rayleigh-Ritz (Saad, Numerical
Methods for Large Eigenvalue Problems, ch. 5): products of matrices, which a GPU does for a whole batch at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_merge.algebra.symmetric import LARGEST_AT_ONCE, descending_eigh

TOLERANCE = 1e-10  # of residuals ‖M v − θ v‖, relative to the largest eigenvalue
SHIFT = 1e-3  # of the trace: keeps the columns independent where a matrix has fewer dimensions than they
PRODUCTS = 2  # before the columns are made orthonormal again
STEPS = 2  # of these before a projection
ROUNDS = 6  # projections after which a matrix is left to descending_eigh


class LeadingVectors:
    """The `width` leading eigenvectors of the matrices of a batch, each time begun from those found the last time."""

    def __init__(self, width: int) -> None:
        self.width = width
        self._near: Tensor | None = None

    def of(self, matrices: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        """Eigenvalues (batch, k), clamped at 0, and eigenvectors (batch, K, k), largest first, k = min(width, K).

        matrices: (batch, K, K) positive semi-definite, float64; which: their positions (batch,) among those of the first
        call, in which all were given.
        """
        size, wide = matrices.shape[-1], 2 * self.width
        if not matrices.is_cuda or size <= LARGEST_AT_ONCE or wide > LARGEST_AT_ONCE:
            values, vectors = descending_eigh(matrices)
        elif self._near is None:
            values, vectors = descending_eigh(matrices)
            self._near = vectors[:, :, :wide].clone()
        else:
            values, vectors, settled = iterate(matrices, self._near[which], self.width)
            if not bool(settled.all()):
                exact = descending_eigh(matrices[~settled])
                values[~settled], vectors[~settled] = (part[..., :wide] for part in exact)
            self._near[which] = vectors
        return values[:, : self.width], vectors[:, :, : self.width]


def iterate(matrices: Tensor, near: Tensor, wanted: int) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues (batch, p), eigenvectors (batch, K, p), and for which matrices the first `wanted` are right (batch,).

    near: (batch, K, p) independent columns to begin with, p > wanted: the more, the fewer steps.
    """
    trace = matrices.diagonal(dim1=-2, dim2=-1).sum(-1)
    shift = SHIFT * trace[:, None, None] * torch.eye(matrices.shape[-1], dtype=near.dtype, device=near.device)
    shifted, basis = matrices + shift, near
    for _ in range(ROUNDS):
        for _ in range(STEPS):
            for _ in range(PRODUCTS):
                basis = shifted @ basis
            basis = _orthonormal(basis)
        image = matrices @ basis
        projected = basis.mT @ image
        whole = projected.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
        values, turn = descending_eigh(torch.where(whole, projected, 0.0))  # which takes no nan
        basis, image = basis @ turn, image @ turn
        residuals = torch.linalg.vector_norm(image - basis * values[:, None, :], dim=1)[:, :wanted].amax(-1)
        settled = residuals <= TOLERANCE * values[:, 0]  # nan is not
        if bool(settled.all()):
            break
    return values, basis, settled


def _orthonormal(columns: Tensor) -> Tensor:
    """Their orthonormal basis by Cholesky, twice; nan where they are dependent."""
    for _ in range(2):
        columns = columns / torch.linalg.vector_norm(columns, dim=1, keepdim=True)
        factor, failed = torch.linalg.cholesky_ex(columns.mT @ columns)
        factor = torch.where((failed == 0)[:, None, None], factor, torch.nan)
        columns = torch.linalg.solve_triangular(factor.mT, columns, upper=True, left=False)
    return columns
