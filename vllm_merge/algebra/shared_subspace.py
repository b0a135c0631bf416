# SPDX-License-Identifier: Apache-2.0
"""The output directions that tasks share, on their numerical support.

The leading left singular vectors of every task side by side, and of these again the leading left singular vectors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_merge.algebra.bases import TOLERANCE, gram, orthonormal_basis
from vllm_merge.algebra.ranks import numerical_rank
from vllm_merge.algebra.symmetric import descending_eigh


def shared_subspace(b: Tensor, gram_a: Tensor, slots: Sequence[slice], d_in: int, parts: int) -> Tensor:
    """Orthonormal columns (modules, d_out, k) float64, zero beyond a module's own number.

    b: (modules, d_out, K) float64, gram_a: A Aᵀ (modules, K, K). With n tasks that are not zero and R the smaller of
    min(d_out, d_in) and the sum of their ranks, every task gives its first ⌊R / n⌋ vectors (at most its rank), and the
    first ⌊R / parts⌋ of all are returned. Singular values that are equal to the last of them are not torn apart: all
    their vectors are returned, because which of them came first would be arbitrary.
    """
    vectors, ranks = zip(*(_left_vectors(b[:, :, slot], gram_a[:, slot, slot]) for slot in slots), strict=True)
    rank = torch.stack(ranks, dim=1)
    size = rank.sum(1).clamp_max(min(b.shape[1], d_in))
    each = torch.minimum(rank, (size // (rank > 0).sum(1).clamp_min(1))[:, None])
    chosen = torch.cat(
        [
            found * (torch.arange(found.shape[2], device=b.device) < count[:, None])[:, None]
            for found, count in zip(vectors, each.unbind(1), strict=True)
        ],
        dim=2,
    )
    values, rotation = descending_eigh(gram(chosen))
    count = size // parts
    last = values.gather(1, (count - 1).clamp_min(0)[:, None])
    kept = (values >= last * (1 - TOLERANCE)) & (count > 0)[:, None] & (values > TOLERANCE)
    inverse = torch.where(kept, 1 / values.clamp_min(TOLERANCE).sqrt(), 0.0)
    return chosen @ (rotation * inverse[:, None])[:, :, : int(kept.sum(1).max())]


def _left_vectors(b: Tensor, gram_a: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors of B A, largest first, (modules, d_out, r), and the numerical rank (modules,)."""
    basis = orthonormal_basis(gram(b), min(b.shape[1:]))
    values, rotation = descending_eigh(basis.R @ gram_a @ basis.R.mT)
    return b @ (basis.T @ rotation), numerical_rank(values)
