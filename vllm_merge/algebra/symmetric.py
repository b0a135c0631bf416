# SPDX-License-Identifier: Apache-2.0
"""Eigendecomposition of batches of small symmetric matrices."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor


def descending_eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, clamped at 0, and eigenvectors of positive semi-definite (batch, k, k) matrices, largest first."""
    if matrices.device.type == "cpu" and matrices.shape[0] > 1 and torch.get_num_threads() > 1:
        # LAPACK takes the matrices of a batch one after the other; the batch is what there is to run in parallel.
        pieces = matrices.chunk(torch.get_num_threads())
        with ThreadPoolExecutor(len(pieces)) as pool:
            solved = list(pool.map(torch.linalg.eigh, pieces))
        values, vectors = (torch.cat(parts) for parts in zip(*solved, strict=True))
    else:
        values, vectors = torch.linalg.eigh(matrices)
    return values.clamp_min(0).flip(-1), vectors.flip(-1)
