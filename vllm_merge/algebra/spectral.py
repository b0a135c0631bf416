# SPDX-License-Identifier: Apache-2.0
"""Singular triples and polar factors of batches of small float64 matrices, on their numerical support only.

Singular vectors of the null space are arbitrary: they never appear here. What a matrix lacks to the rank of its batch
is zero columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_merge.algebra.bases import TOLERANCE, gram, orthonormal_basis
from vllm_merge.algebra.symmetric import descending_eigh

NEWTON_SCHULZ_STEPS = 30  # for singular values down to 1e-4 of the largest
POLAR_ERROR = 1e-12  # of orthonormality


@dataclass(frozen=True, slots=True)
class Triples:
    """X = U diag(S) Vᵀ. U: (modules, rows, k), S: (modules, k), largest first, V: (modules, cols, k), float64."""

    U: Tensor
    S: Tensor
    V: Tensor

    @property
    def rank(self) -> Tensor:
        """Numerical rank, (modules,) int64."""
        return (self.S > 0).sum(-1)

    @property
    def mean(self) -> Tensor:
        """Mean of the singular values on the support, (modules,); 0 for a zero matrix."""
        return self.S.sum(-1) / self.rank.clamp_min(1)

    def leading(self, count: Tensor) -> Triples:
        """The first count (modules,) triples of each, zero beyond."""
        keep = torch.arange(self.S.shape[1], device=count.device) < count[:, None]
        return Triples(self.U * keep[:, None], self.S * keep, self.V * keep[:, None])

    @classmethod
    def cat(cls, pieces: Sequence[Triples]) -> Triples:
        """All triples side by side; U and V then are not orthonormal."""
        return cls(
            torch.cat([piece.U for piece in pieces], dim=-1),
            torch.cat([piece.S for piece in pieces], dim=-1),
            torch.cat([piece.V for piece in pieces], dim=-1),
        )


def triples_of(matrix: Tensor, floor: Tensor | None = None) -> Triples:
    """Singular triples of (modules, rows, cols) matrices. floor: (modules,), what at most counts as rounding of 0."""
    if matrix.shape[1] < matrix.shape[2]:
        turned = triples_of(matrix.mT, floor)
        return Triples(turned.V, turned.S, turned.U)
    values, vectors = descending_eigh(gram(matrix))
    least = TOLERANCE**2 * values[:, :1]
    if floor is not None:
        least = torch.maximum(least, floor[:, None] ** 2)
    support = values > least
    singular = torch.where(support, values, 0.0).sqrt()
    vectors = vectors * support[:, None, :]
    inverse = torch.where(support, 1 / singular, 0.0)
    return Triples(matrix @ vectors * inverse[:, None, :], singular, vectors)


def triples_of_product(left: Tensor, right: Tensor, floor: Tensor | None = None) -> Triples:
    """Singular triples of left @ right, (modules, rows, r) and (modules, r, cols), from r × r work.

    floor: (modules,), what at most counts as rounding of 0.
    """
    out = orthonormal_basis(gram(left), min(left.shape[1:]))
    into = orthonormal_basis(gram(right.mT), min(right.shape[1:]))
    inner = triples_of(out.R @ into.R.mT, floor)
    return Triples(left @ (out.T @ inner.U), inner.S, right.mT @ (into.T @ inner.V))


def triples_of_each(
    tasks: Sequence[tuple[Tensor, Tensor]], floors: Sequence[Tensor] | None = None
) -> Sequence[Triples]:
    """`triples_of_product` of each; all at once where they have the same shapes."""
    if len({(left.shape, right.shape) for left, right in tasks}) > 1:
        return [triples_of_product(*t, floors[index] if floors else None) for index, t in enumerate(tasks)]
    lefts, rights = zip(*tasks, strict=True)
    every = triples_of_product(torch.cat(lefts), torch.cat(rights), None if floors is None else torch.cat(list(floors)))
    parts = [part.chunk(len(tasks)) for part in (every.U, every.S, every.V)]
    return [Triples(*part) for part in zip(*parts, strict=True)]


def polar(matrix: Tensor) -> Tensor:
    """X (XᵀX)^(−1/2) on the support: U Vᵀ of the singular value decomposition, (modules, rows, cols).

    Repeated columns stay repeated, scaled down; without a tolerance they would add an arbitrary part.
    """
    if (full := _polar_of_full_rank(matrix)) is not None:
        return full
    triples = triples_of(matrix)
    return triples.U @ triples.V.mT


def _polar_of_full_rank(matrix: Tensor) -> Tensor | None:
    """On a GPU, `polar` by Newton–Schulz steps, which are products alone; None where a singular value is too small for it.

    X ← X (3 − XᵀX) / 2 lets the singular vectors be and takes every singular value in (0, √3) to 1, small ones in steps of
    1.5 times (Higham, Functions of Matrices, 2008, §8.3).
    """
    if not matrix.is_cuda:
        return None
    if matrix.shape[1] < matrix.shape[2]:
        turned = _polar_of_full_rank(matrix.mT)
        return None if turned is None else turned.mT
    # ‖XᵀX‖_F ≥ σ₁², and nearer to it than ‖X‖²_F.
    size = torch.linalg.matrix_norm(matrix.mT @ matrix).sqrt().clamp_min(torch.finfo(matrix.dtype).tiny)
    guess = matrix / size[:, None, None]
    one = torch.eye(matrix.shape[2], dtype=matrix.dtype, device=matrix.device)
    for _ in range(NEWTON_SCHULZ_STEPS):
        guess = torch.baddbmm(guess, guess, guess.mT @ guess, beta=1.5, alpha=-0.5)
    away = (guess.mT @ guess - one).abs().amax((-1, -2))
    return guess if bool((away < POLAR_ERROR).all()) else None


def isotropic(matrix: Tensor) -> Tensor:
    """The matrix with the mean of its singular values for each of them, on its support."""
    if (full := _polar_of_full_rank(matrix)) is not None:  # and Σσ = ⟨U Vᵀ, X⟩
        return full * ((full * matrix).sum((-1, -2)) / min(matrix.shape[1:]))[:, None, None]
    triples = triples_of(matrix)
    return triples.mean[:, None, None] * (triples.U @ triples.V.mT)
