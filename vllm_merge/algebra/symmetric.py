# SPDX-License-Identifier: Apache-2.0
"""Eigendecomposition of batches of small symmetric matrices.

On a GPU, `eigh` takes the matrices of a batch nearly one after the other: 0.35 s for 224 matrices of 128 in float64 on an
H200. The approximate batched SVD does them together in 0.004 s, and two steps of iterative refinement make it exact.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

LARGEST_APPROXIMATE = 256  # matrices beyond this fill the GPU one by one
REFINEMENTS = 2
ACCEPTED_ERROR = 1e-13
"""Off-diagonal, relative to the largest entry of the diagonal; and of orthonormality. Well under the square of the tolerance
of singular values: otherwise a null vector that is mixed with a small one counts as support."""


def descending_eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, clamped at 0, and eigenvectors of positive semi-definite (batch, k, k) matrices, largest first."""
    if matrices.device.type == "cpu" and matrices.shape[0] > 1 and torch.get_num_threads() > 1:
        # LAPACK takes the matrices of a batch one after the other; the batch is what there is to run in parallel.
        pieces = matrices.chunk(torch.get_num_threads())
        with ThreadPoolExecutor(len(pieces)) as pool:
            solved = list(pool.map(torch.linalg.eigh, pieces))
        values, vectors = (torch.cat(parts) for parts in zip(*solved, strict=True))
    elif matrices.is_cuda and matrices.shape[0] > 1 and 0 < matrices.shape[-1] <= LARGEST_APPROXIMATE:
        return _approximate_then_refined(matrices)
    else:
        values, vectors = torch.linalg.eigh(matrices)
    return values.clamp_min(0).flip(-1), vectors.flip(-1)


def _approximate_then_refined(matrices: Tensor) -> tuple[Tensor, Tensor]:
    wide = matrices.double()
    scale = wide.diagonal(dim1=-2, dim2=-1).amax(-1).clamp_min(torch.finfo(torch.float64).tiny)
    wide = wide / scale[:, None, None]
    values, vectors = from_approximation(wide, torch.linalg.svd(wide, driver="gesvda").U)
    return (values.clamp_min(0) * scale[:, None]).to(matrices.dtype), vectors.to(matrices.dtype)


def from_approximation(matrices: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors, largest first, of matrices with a largest diagonal entry of 1, from approximate vectors.

    The result is checked; matrices whose approximation was not good enough are done again by `eigh`.
    """
    for _ in range(REFINEMENTS):
        vectors = refined(matrices, vectors)
    square = vectors.mT @ matrices @ vectors
    values = square.diagonal(dim1=-2, dim2=-1)
    identity = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    error = torch.maximum(
        (square - torch.diag_embed(values)).abs().amax((-1, -2)),
        (vectors.mT @ vectors - identity).abs().amax((-1, -2)),
    )
    failed = ~(error < ACCEPTED_ERROR)  # nan fails, too
    if bool(failed.any()):
        again, vectors_again = torch.linalg.eigh(matrices[failed])
        values = values.index_put((failed,), again)
        vectors = vectors.index_put((failed,), vectors_again)
    values, order = values.sort(-1, descending=True)
    return values, vectors.gather(-1, order[:, None, :].expand_as(vectors))


def refined(matrices: Tensor, vectors: Tensor) -> Tensor:
    """One step towards the eigenvectors of symmetric (batch, k, k) matrices from nearly orthonormal approximations.

    Converges quadratically; vectors of eigenvalues that are not told apart yet are only made orthonormal.
    Ogita and Aishima, Iterative refinement for symmetric eigenvalue decomposition (JJIAM 35, 2018), algorithm 1.
    """
    identity = torch.eye(vectors.shape[-1], dtype=vectors.dtype, device=vectors.device)
    residual = identity - vectors.mT @ vectors
    square = vectors.mT @ matrices @ vectors
    values = square.diagonal(dim1=-2, dim2=-1) / (1 - residual.diagonal(dim1=-2, dim2=-1))
    away = torch.linalg.matrix_norm(square - torch.diag_embed(values))
    size = torch.linalg.matrix_norm(matrices) * torch.linalg.matrix_norm(residual)
    gaps = values[:, None, :] - values[:, :, None]
    told_apart = gaps.abs() > 2 * (away + size)[:, None, None]
    step = (square + values[:, None, :] * residual) / torch.where(told_apart, gaps, 1.0)
    return vectors + vectors @ torch.where(told_apart, step, residual / 2)
