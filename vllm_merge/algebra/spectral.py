# SPDX-License-Identifier: Apache-2.0
"""Singular triples and polar factors of batches of small float64 matrices, on their numerical support only.

Singular vectors of the null space are arbitrary: they never appear here. What a matrix lacks to the rank of its batch
is zero columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from vllm_merge.algebra.bases import TOLERANCE, bases_at_once, gram, orthonormal_basis
from vllm_merge.algebra.symmetric import descending_eigh

LEAST_SINGULAR_VALUE = 1e-5  # that Newton–Schulz steps are made for, relative to a bound of the largest
NEARLY_SINGULAR = 2e-6  # and for which more of them are; above TOLERANCE, under which there is no singular vector
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

    def leading(self, count: Tensor, most: int | None = None) -> Triples:
        """The first count (modules,) triples of each, zero beyond, and not even that beyond the largest count, if given."""
        keep = torch.arange(self.S.shape[1], device=count.device)[:most] < count[:, None]
        u, singular, v = self.U[:, :, :most], self.S[:, :most], self.V[:, :, :most]
        return Triples(u * keep[:, None], singular * keep, v * keep[:, None])

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
    grams, widths = (gram(left), gram(right.mT)), (min(left.shape[1:]), min(right.shape[1:]))
    both = list(zip(grams, widths, strict=True))
    out, into = bases_at_once(grams, widths) or [orthonormal_basis(each, width) for each, width in both]
    inner = triples_of(out.R @ into.R.mT, floor)
    return Triples(left @ (out.T @ inner.U), inner.S, right.mT @ (into.T @ inner.V))


def triples_of_each(
    tasks: Sequence[tuple[Tensor, Tensor]],
    floors: Sequence[Tensor] | None = None,
    change: Callable[[Triples], Triples] = lambda triples: triples,
) -> Sequence[Triples]:
    """`triples_of_product` of each, changed; all at once where they have the same shapes."""
    if len({(left.shape, right.shape) for left, right in tasks}) > 1:
        return [change(triples_of_product(*t, floors[index] if floors else None)) for index, t in enumerate(tasks)]
    lefts, rights = zip(*tasks, strict=True)
    floor = None if floors is None else torch.cat(list(floors))
    every = change(triples_of_product(torch.cat(lefts), torch.cat(rights), floor))
    parts = [part.chunk(len(tasks)) for part in (every.U, every.S, every.V)]
    return [Triples(*part) for part in zip(*parts, strict=True)]


def ranks_of_each(several: Sequence[Triples]) -> Tensor:
    """Numerical ranks, (modules, n) int64."""
    if len({task.S.shape[1] for task in several}) > 1:
        return torch.stack([task.rank for task in several], 1)
    return (torch.stack([task.S for task in several], 1) > 0).sum(-1)


def leading_of_each(several: Sequence[Triples], counts: Tensor, most: int | None = None) -> Triples:
    """`Triples.leading` of each, counts (modules, n), side by side; U and V then are not orthonormal."""
    every = Triples.cat([Triples(task.U[:, :, :most], task.S[:, :most], task.V[:, :, :most]) for task in several])
    widths = [len(range(task.S.shape[1])[:most]) for task in several]
    places = torch.tensor([[task, at] for task, width in enumerate(widths) for at in range(width)], dtype=torch.int64)
    task, at = places.reshape(-1, 2).to(counts.device, non_blocking=True).unbind(1)
    keep = at < counts[:, task]
    return Triples(every.U * keep[:, None], every.S * keep, every.V * keep[:, None])


def polar_of_each(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """`polar` of both; on a GPU, which waits for launches here, at once where they have one shape."""
    if not one.is_cuda or one.shape != other.shape:
        return polar(one), polar(other)
    first, second = polar(torch.cat([one, other])).chunk(2)
    return first, second


def polar(matrix: Tensor) -> Tensor:
    """X (XᵀX)^(−1/2) on the support: U Vᵀ of the singular value decomposition, (modules, rows, cols).

    Repeated columns stay repeated, scaled down; without a tolerance they would add an arbitrary part.
    """
    if not matrix.is_cuda:
        return _polar_on_support(matrix)
    return polar_by_products(matrix) if matrix.shape[1] >= matrix.shape[2] else polar_by_products(matrix.mT).mT


def polar_by_products(matrix: Tensor) -> Tensor:
    """`polar` without eigenvalues, which take a GPU longer, where the rank is full. matrix: rows ≥ cols."""
    found, right = polar_of_full_rank(matrix)
    others = (~right).nonzero()[:, 0]
    if len(others):
        found[others], right = polar_of_full_rank(found[others], _lifted(NEARLY_SINGULAR) / matrix.shape[2] ** 0.25)
        others = others[~right]
    if len(others):
        found[others] = _polar_on_support(matrix[others])
    return found


def _polar_on_support(matrix: Tensor) -> Tensor:
    triples = triples_of(matrix)
    return triples.U @ triples.V.mT


def polar_of_full_rank(matrix: Tensor, least: float = LEAST_SINGULAR_VALUE) -> tuple[Tensor, Tensor]:
    """`polar` by Newton–Schulz steps, which are products alone, and for which it is right (modules,): not where a singular
    value is less than `least`, relative to a bound of the largest, (Σ σ⁴)^¼. There it is a step towards it.

    matrix: (modules, rows, cols), rows ≥ cols. X ← ρX (3 − ρ²XᵀX) / 2 lets the singular vectors be and takes [l, 1], where
    the singular values are, into [l′, 1], l′ = ρl (3 − ρ²l²) / 2, for ρ² = 3 / (1 + l + l²): small ones grow 2.6-fold (Chen
    and Chow, A stable scaling of Newton–Schulz for improving the sign function computation of a Hermitian matrix, 2014).
    """
    # ‖XᵀX‖_F ≥ σ₁², and nearer to it than ‖X‖²_F.
    size = torch.linalg.matrix_norm(matrix.mT @ matrix).sqrt().clamp_min(torch.finfo(matrix.dtype).tiny)
    guess = matrix / size[:, None, None]
    for once, thrice in _newton_schulz(least):
        guess = torch.baddbmm(guess, guess, guess.mT @ guess, beta=once, alpha=-thrice)
    one = torch.eye(matrix.shape[2], dtype=matrix.dtype, device=matrix.device)
    return guess, (guess.mT @ guess - one).abs().amax((-1, -2)) < POLAR_ERROR


def _newton_schulz(least: float) -> Iterator[tuple[float, float]]:
    """a and b of the steps X ← a X − b X XᵀX."""
    while True:
        square = 3 / (1 + least + least * least)
        root = square**0.5
        yield 1.5 * root, 0.5 * root * square
        if (1 - least) ** 2 < POLAR_ERROR / 100:  # what is left after this step
            return
        least *= root * (3 - square * least * least) / 2


@cache
def _lifted(value: float) -> float:
    """What `polar_of_full_rank` makes of a singular value that is less than it is made for."""
    for once, thrice in _newton_schulz(LEAST_SINGULAR_VALUE):
        value = once * value - thrice * value**3
    return value


def isotropic(matrix: Tensor) -> Tensor:
    """The matrix with the mean of its singular values for each of them, on its support."""
    direction = polar(matrix)
    total = (direction * matrix).sum((-1, -2))  # Σσ = ⟨U Vᵀ, X⟩
    rank = direction.square().sum((-1, -2)).round().clamp_min(1)
    return direction * (total / rank)[:, None, None]
