# SPDX-License-Identifier: Apache-2.0
"""Thin factors of matrices that come in strips: exact from the Gram matrix, or by a randomised range finder.

Each matrix X (long, short), short ≤ long, is seen as strips of its rows, as often as needed. The result is the best
approximation of its rank (Eckart–Young): X ≈ L Rᵀ with √σ in both factors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_merge.algebra.ranks import RankPolicy, numerical_rank
from vllm_merge.algebra.symmetric import descending_eigh

Strips = Callable[[], Iterator[Tensor]]
"""Starts a pass over the strips X[:, rows], each (modules, rows, short), in order."""

GRAM_LIMIT = 1024
OVERSAMPLING = 16
POWER_ITERATIONS = 4


@dataclass(frozen=True, slots=True)
class Spectrum:
    """Leading right singular vectors (modules, short, k), squared singular values (modules, k), the sum of all of them.

    numerical: the numerical rank, (modules,); where only the leading values are known, an upper bound.
    """

    vectors: Tensor
    values: Tensor
    total: Tensor
    numerical: Tensor


@dataclass(frozen=True, slots=True)
class Truncated:
    """X ≈ long @ shortᵀ. long: (modules, long, k), short: (modules, short, k), float64 where X is; ranks: (modules,).

    Columns beyond a module's rank are zero. exact: whether nothing was cut off; norm: ‖long shortᵀ‖_F; energy: the share
    of ‖X‖²_F it has; all (modules,).
    """

    long: Tensor
    short: Tensor
    ranks: Tensor
    exact: Tensor
    norm: Tensor
    energy: Tensor


def truncate(strips: Strips, shape: tuple[int, int], policy: RankPolicy, rank_sums: Tensor, seed: int) -> Truncated:
    """Thin factors of a batch of matrices of shape (long, short), at the ranks the policy chooses."""
    long, short = shape
    limits = policy.limits(rank_sums)
    bound = None if limits is None else int(limits.max())
    if bound is None or short <= GRAM_LIMIT or bound + OVERSAMPLING >= short // 2:
        spectrum = _gram_spectrum(strips)
    else:
        spectrum = _range_spectrum(strips, short, bound + OVERSAMPLING, seed)
    ranks = policy.choose(spectrum.values, spectrum.total, rank_sums)
    exact = ranks >= spectrum.numerical
    kept = int(ranks.max())
    mask = torch.arange(kept, device=ranks.device) < ranks[:, None]
    values = torch.where(mask, spectrum.values[:, :kept], 0.0)
    root = values.pow(0.25)  # √σ
    vectors = spectrum.vectors[:, :, :kept] * mask[:, None, :]
    inverse = torch.where(mask, 1 / root, 0.0)
    parts = []
    for strip in strips():
        parts.append(strip @ (vectors * inverse[:, None, :]).to(strip.dtype))
    norm = values.sum(-1)
    energy = torch.where(spectrum.total > 0, norm / spectrum.total, 1.0)
    return Truncated(torch.cat(parts, dim=1), vectors * root[:, None, :], ranks, exact, norm.sqrt(), energy)


def _gram_spectrum(strips: Strips) -> Spectrum:
    gram: Tensor | None = None
    for strip in strips():
        wide = strip.double()
        gram = wide.mT @ wide if gram is None else gram.baddbmm_(wide.mT, wide)
    assert gram is not None
    values, vectors = descending_eigh(gram)
    return Spectrum(vectors, values, gram.diagonal(dim1=-2, dim2=-1).sum(-1), numerical_rank(values))


def _range_spectrum(strips: Strips, short: int, width: int, seed: int) -> Spectrum:
    """Subspace iteration on XᵀX from a seeded start, then Rayleigh–Ritz (Halko, Martinsson, Tropp, arXiv:0909.4061)."""
    start = torch.randn(short, width, generator=torch.Generator().manual_seed(seed))
    subspace: Tensor | None = None
    for _ in range(POWER_ITERATIONS):
        image: Tensor | None = None
        for strip in strips():
            if subspace is None:
                subspace = start.to(strip.device, strip.dtype).expand(strip.shape[0], -1, -1)
            product = strip.mT @ (strip @ subspace)
            image = product if image is None else image.add_(product)
        assert image is not None
        subspace = torch.linalg.qr(image).Q
    assert subspace is not None
    small: Tensor | None = None
    total: Tensor | None = None
    for strip in strips():
        product = (strip @ subspace).double()
        square, energy = product.mT @ product, strip.double().square().sum((-1, -2))
        small = square if small is None else small.add_(square)
        total = energy if total is None else total.add_(energy)
    assert small is not None and total is not None
    values, rotation = descending_eigh(small)
    return Spectrum(subspace.double() @ rotation, values, total, torch.full_like(values[:, 0], short).long())
