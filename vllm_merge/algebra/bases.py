# SPDX-License-Identifier: Apache-2.0
"""Rank-revealing orthonormal bases of stacked factors, from their Gram matrices in float64.

A stack X (d, K) has an orthonormal basis Q = X T of its column space, and X = Q R. Only XᵀX enters, so d is touched
twice (the Gram matrix before, X T at the end) and everything between is K × K. The columns are equilibrated first:
the support does not depend on how large one adapter is beside another, nor on how its scale is split between A and B.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_merge.algebra.symmetric import descending_eigh, inverse_cholesky

TOLERANCE = 1e-6  # of singular values, relative to the largest


@dataclass(frozen=True, slots=True)
class Basis:
    """Q = X T and X = Q R. T: (modules, K, k), R: (modules, k, K), float64; rank: (modules,) int64, the numerical rank.

    Columns of T and rows of R beyond the rank are zero.
    """

    T: Tensor
    R: Tensor
    rank: Tensor


def gram(stack: Tensor, at_a_time: int | None = None) -> Tensor:
    """XᵀX of (modules, d, K) stacks, accumulated in float64. at_a_time: how many are widened together, all without it."""
    pieces = (piece.double() for piece in torch.split(stack, at_a_time or max(1, len(stack))))
    found = [wide.mT @ wide for wide in pieces]
    return found[0] if len(found) == 1 else torch.cat(found)


def bases_at_once(grams: Sequence[Tensor], widths: Sequence[int], *, singular: bool = False) -> list[Basis] | None:
    """`orthonormal_basis` of each in the launches of one, which a GPU waits for; None where that is no quicker: on a CPU, for
    several shapes, and where one of them has to be decomposed that would not be by itself."""
    width = widths[0]
    if not grams[0].is_cuda or len({(each.shape, columns) for each, columns in zip(grams, widths, strict=True)}) > 1:
        return None
    joined = torch.cat(list(grams))
    if singular or width < joined.shape[-1]:
        every: Basis | None = orthonormal_basis(joined, width, singular=singular)
    else:
        every = _of_full_rank(joined)
    if every is None:
        return None
    parts = [part.chunk(len(grams)) for part in (every.T, every.R, every.rank)]
    return [Basis(*part) for part in zip(*parts, strict=True)]


def orthonormal_basis(gram_matrix: Tensor, width: int, *, singular: bool = False) -> Basis:
    """Basis of the column space of stacks, from their Gram matrices (modules, K, K).

    width: number of columns to return, at least the largest possible rank, min(d, K).
    singular: make Q the left singular vectors of the stack, largest first (the bases of Core Space merging,
    arXiv:2509.17786); otherwise any orthonormal basis of the same space.
    """
    if gram_matrix.is_cuda and not singular and width == gram_matrix.shape[-1]:
        found = _of_full_rank(gram_matrix)
        if found is not None:
            return found
    norms, inverse, equilibrated = _equilibrated(gram_matrix)
    values, vectors = descending_eigh(equilibrated)
    values, vectors = values[:, :width], vectors[:, :, :width]
    support = values > TOLERANCE**2 * values[:, :1]
    roots = torch.where(support, values, 0.0).sqrt()
    inverse_roots = torch.where(support, 1 / roots, 0.0)
    transform = inverse[:, :, None] * vectors * inverse_roots[:, None, :]
    coordinates = roots[:, :, None] * vectors.mT * norms[:, None, :]
    if singular:
        _, rotation = descending_eigh(coordinates @ coordinates.mT)
        transform, coordinates = transform @ rotation, rotation.mT @ coordinates
    return Basis(transform, coordinates, support.sum(-1))


def _equilibrated(gram_matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The lengths D of a stack's columns, D⁻¹, 0 where there is none, and D⁻¹ G D⁻¹."""
    norms = gram_matrix.diagonal(dim1=-2, dim2=-1).sqrt()
    inverse = torch.where(norms > 0, 1 / norms, 0.0)
    return norms, inverse, inverse[:, :, None] * gram_matrix * inverse[:, None, :]


def _of_full_rank(gram_matrix: Tensor) -> Basis | None:
    """By Cholesky, without eigenvalues, which take a GPU longer; None unless every stack is far from losing rank."""
    norms, inverse, equilibrated = _equilibrated(gram_matrix)
    lower = inverse_cholesky(equilibrated)
    if lower is None:
        return None
    # Q = X D⁻¹ L⁻ᵀ, R = Lᵀ D = L⁻¹ (D⁻¹ G D⁻¹) D
    ranks = torch.full(gram_matrix.shape[:1], gram_matrix.shape[-1], device=gram_matrix.device)
    return Basis(inverse[:, :, None] * lower.mT, (lower @ equilibrated) * norms[:, None, :], ranks)
