# SPDX-License-Identifier: Apache-2.0
"""Eigendecomposition of batches of small symmetric matrices.

On a GPU, `torch.linalg.eigh` takes the matrices of a batch one after the other: 0.35 s for 224 matrices of 128 in float64
on an H200, and the approximate batched SVD (`gesvda`) gives up where eigenvalues lie close together, as those of the Gram
matrices of independent adapters do. There the rotations of `kernels.jacobi` take them all at once.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

LARGEST_JACOBI = 256  # rows; larger matrices fill the GPU one by one


def descending_eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, clamped at 0, and eigenvectors of positive semi-definite (batch, k, k) matrices, largest first."""
    if matrices.device.type == "cpu" and matrices.shape[0] > 1 and torch.get_num_threads() > 1:
        # LAPACK takes the matrices of a batch one after the other; the batch is what there is to run in parallel.
        pieces = matrices.chunk(torch.get_num_threads())
        with ThreadPoolExecutor(len(pieces)) as pool:
            solved = list(pool.map(torch.linalg.eigh, pieces))
        values, vectors = (torch.cat(parts) for parts in zip(*solved, strict=True))
    elif matrices.is_cuda and matrices.shape[0] > 1 and 0 < matrices.shape[-1] <= LARGEST_JACOBI:
        return _by_rotations(matrices)
    else:
        values, vectors = torch.linalg.eigh(matrices)
    return values.clamp_min(0).flip(-1), vectors.flip(-1)


def _by_rotations(matrices: Tensor) -> tuple[Tensor, Tensor]:
    from vllm_merge.kernels import jacobi

    wide = matrices.double()
    scale = wide.diagonal(dim1=-2, dim2=-1).amax(-1).clamp_min(torch.finfo(torch.float64).tiny)
    wide = wide / scale[:, None, None]
    values, vectors, converged = jacobi.eigh(wide)
    if not bool(converged.all()):
        values[~converged], vectors[~converged] = torch.linalg.eigh(wide[~converged])
    values, order = values.sort(-1, descending=True)
    vectors = vectors.gather(-1, order[:, None, :].expand_as(vectors))
    return (values.clamp_min(0) * scale[:, None]).to(matrices.dtype), vectors.to(matrices.dtype)


def inverse_cholesky(matrices: Tensor) -> Tensor | None:
    """L⁻¹ of G = L Lᵀ (batch, k, k), float64; None unless every G is far from singular (its condition number at most 1e8)."""
    factor, failed = torch.linalg.cholesky_ex(matrices)
    identity = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    inverse = torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False)
    # ‖G⁻¹‖ ≤ ‖L⁻¹‖²_F and ‖G‖ ≤ tr G.
    condition = inverse.square().sum((-1, -2)) * matrices.diagonal(dim1=-2, dim2=-1).sum(-1)
    return inverse if bool(((failed == 0) & (condition < 1e8)).all()) else None
