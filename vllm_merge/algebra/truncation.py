# SPDX-License-Identifier: Apache-2.0
"""Thin factors of matrices that come in strips.

All singular values, which `lossless` and {energy: x} need, come from the Gram matrix in float64. For a bounded rank the
leading subspace is enough: by subspace iteration on the Gram matrix, or on strips where that is too large,
followed by Rayleigh–Ritz in float64. Each matrix X (long, short), short ≤ long, is seen as strips of its rows, as often
as needed. The result is the best approximation of its rank (Eckart–Young), or within about 1e-3 of its energy where a subspace
was iterated: X ≈ L Rᵀ with √σ in both factors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_merge.algebra.ranks import RankPolicy, numerical_rank
from vllm_merge.algebra.symmetric import descending_eigh, inverse_cholesky

Strips = Callable[[], Iterator[Tensor]]
"""Starts a pass over the strips X[:, rows], each (modules, rows, short), in order."""

EXACT_LIMIT = 128  # short side up to which all singular values are computed, in float64, whatever the rank
GRAM_LIMIT = 1024  # short side up to which the leading vectors come from the Gram matrix rather than a sketch
OVERSAMPLING = 16
POWER_ITERATIONS = 4
GRAM_ITERATIONS = 4  # each far cheaper than one on strips


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

    Columns beyond a module's rank are zero. singular: whether the columns are singular vectors, largest first. exact: whether nothing was cut off; norm: ‖long shortᵀ‖_F; energy: the
    share of ‖X‖²_F it has; all (modules,).
    """

    long: Tensor
    short: Tensor
    ranks: Tensor
    exact: Tensor
    norm: Tensor
    energy: Tensor
    singular: bool = True

    def of(self, modules: slice) -> Truncated:
        """Of some matrices of the batch."""
        return Truncated(
            self.long[modules],
            self.short[modules],
            self.ranks[modules],
            self.exact[modules],
            self.norm[modules],
            self.energy[modules],
            self.singular,
        )


def truncate(
    strips: Strips, short: int, policy: RankPolicy, rank_sums: Tensor, seed: int, *, singular: bool = False
) -> Truncated:
    """Thin factors of a batch of matrices (long, short), at the ranks the policy chooses for rank sums (modules,).

    singular: by singular vectors, even where nothing is cut and other factors are quicker.
    """
    limits = policy.limits(rank_sums)
    bound = None if limits is None else int(limits.max())
    width = short if bound is None else min(short, bound + OVERSAMPLING)
    if width == short or short <= EXACT_LIMIT:
        gram = _gram(strips, torch.float64)
        if not singular and (whole := _uncut(strips, gram, policy, limits)) is not None:
            return whole
        spectrum = _full_spectrum(gram)
    elif short <= GRAM_LIMIT or width >= short // 2:
        spectrum = _leading_spectrum(strips, short, width + width // 4, seed)
    else:
        spectrum = _spectrum_within(strips, _sketch(strips, short, width, seed))
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
    energy = torch.where(spectrum.total > 0, norm / spectrum.total, 1.0).clamp_max(1)
    return Truncated(torch.cat(parts, dim=1), vectors * root[:, None, :], ranks, exact, norm.sqrt(), energy)


def _uncut(strips: Strips, gram: Tensor, policy: RankPolicy, limits: Tensor | None) -> Truncated | None:
    """On a GPU, where nothing is to be cut and every X has full rank: X = (X L⁻ᵀ) Lᵀ with XᵀX = L Lᵀ, with no spectrum.

    Else None. Eigenvalues take the GPU much longer than they take a CPU.
    """
    short = gram.shape[-1]
    if not gram.is_cuda or policy.energy is not None or short > EXACT_LIMIT:
        return None
    if limits is not None and bool((limits < short).any()):
        return None
    total = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    lower = inverse_cholesky(gram / total.clamp_min(torch.finfo(gram.dtype).tiny)[:, None, None])
    if lower is None:
        return None
    # Columns of equal length in both factors, as √σ would have on average.
    root = (total / short).pow(0.25)[:, None, None]
    transform = lower.mT / total.sqrt()[:, None, None]
    long = torch.cat([strip @ (transform * root).to(strip.dtype) for strip in strips()], dim=1)
    one = torch.ones_like(total)
    ranks = torch.full(total.shape, short, device=total.device)
    return Truncated(long, gram @ transform / root, ranks, one > 0, total.sqrt(), one, singular=False)


def _gram(strips: Strips, dtype: torch.dtype) -> Tensor:
    gram: Tensor | None = None
    for strip in strips():
        wide = strip.to(dtype)
        gram = wide.mT @ wide if gram is None else gram.baddbmm_(wide.mT, wide)
    assert gram is not None
    return gram


def _full_spectrum(gram: Tensor) -> Spectrum:
    values, vectors = descending_eigh(gram)
    return Spectrum(vectors, values, gram.diagonal(dim1=-2, dim2=-1).sum(-1), numerical_rank(values))


def _leading_spectrum(strips: Strips, short: int, width: int, seed: int) -> Spectrum:
    """The leading singular values and vectors, or those of a subspace that holds them nearly, from XᵀX.

    In float64: singular values lie close together where they are cut, and float32's rounding, which depends on the
    number of threads, would turn the vectors there by 1e-4.
    """
    gram = _gram(strips, torch.float64)
    total = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    if width > short // 2:  # iterating would be no cheaper
        values, vectors = descending_eigh(gram)
        return Spectrum(vectors, values, total, numerical_rank(values))
    start = torch.randn(short, width, generator=torch.Generator().manual_seed(seed))
    subspace = start.to(gram.device, gram.dtype).expand(gram.shape[0], -1, -1)
    for step in range(GRAM_ITERATIONS):
        image = gram @ subspace
        if step % 2:
            subspace = _orthonormal(image)
        else:
            subspace = image / torch.linalg.vector_norm(image, dim=(-1, -2), keepdim=True).clamp_min(1e-30)
    values, rotation = descending_eigh(subspace.mT @ gram @ subspace)
    ranks = numerical_rank(values)
    # A rank that fills the subspace may be larger outside it.
    return Spectrum(subspace @ rotation, values, total, torch.where(ranks < width, ranks, short))


def _sketch(strips: Strips, short: int, width: int, seed: int) -> Tensor:
    """Subspace iteration on XᵀX from a seeded start (Halko, Martinsson, Tropp, arXiv:0909.4061, algorithm 4.4)."""
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
        subspace = _orthonormal(image)
    assert subspace is not None
    return subspace


def _orthonormal(columns: Tensor) -> Tensor:
    """An orthonormal basis of the columns (modules, d, k); on a GPU by Cholesky, whose `qr` takes the modules one by one."""
    if columns.is_cuda:
        scaled = columns / torch.linalg.vector_norm(columns, dim=1, keepdim=True).clamp_min(1e-30)
        wide = scaled.double()
        lower = inverse_cholesky(wide.mT @ wide)
        if lower is not None:
            basis: Tensor = (wide @ lower.mT).to(columns.dtype)
            return basis
    exact: Tensor = torch.linalg.qr(columns).Q
    return exact


def _spectrum_within(strips: Strips, subspace: Tensor) -> Spectrum:
    """Rayleigh–Ritz: the singular values and vectors of X restricted to a subspace (modules, short, width)."""
    subspace = subspace.double()
    subspace = 1.5 * subspace - 0.5 * subspace @ (subspace.mT @ subspace)  # orthonormal in float32, now in float64
    projected: Tensor | None = None
    total: Tensor | None = None
    for strip in strips():
        product = (strip @ subspace.to(strip.dtype)).double()
        square, energy = product.mT @ product, torch.linalg.vector_norm(strip, dim=(-1, -2)).double().square()
        projected = square if projected is None else projected.add_(square)
        total = energy if total is None else total.add_(energy)
    assert projected is not None
    assert total is not None
    values, rotation = descending_eigh(projected)
    short, width = subspace.shape[1:]
    ranks = numerical_rank(values)
    # A rank that fills the subspace may be larger outside it.
    return Spectrum(subspace @ rotation, values, total, torch.where(ranks < width, ranks, short))
