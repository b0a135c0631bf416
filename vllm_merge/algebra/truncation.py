# SPDX-License-Identifier: Apache-2.0
"""Thin factors of matrices that come in strips.

All singular values, which `lossless` and {energy: x} need, come from the Gram matrix in float64. For a bounded rank the
leading subspace is enough: by subspace iteration on the Gram matrix, or on strips where that is too large,
followed by Rayleigh–Ritz in float64. Each matrix X (long, short), short ≤ long, is seen as strips of its rows, as often
as needed. The result is the best approximation of its rank (Eckart–Young), or where a subspace was iterated within 1 % of
its energy however flat the spectrum is, most often within 1e-3: X ≈ L Rᵀ with √σ in both factors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from vllm_merge.algebra.ranks import RankPolicy, numerical_rank
from vllm_merge.algebra.symmetric import descending_eigh, inverse_cholesky_each
from vllm_merge.kernels import turns

Strips = Callable[[], Iterator[Tensor]]
"""Starts a pass over the strips X[:, rows], each (modules, rows, short), in order."""

EXACT_LIMIT = 128  # short side up to which all singular values are computed, in float64, whatever the rank
GRAM_LIMIT = 1024  # short side up to which the leading vectors come from the Gram matrix rather than a sketch
OVERSAMPLING = 64  # the sum of many adapters has a flat spectrum: 16 would keep 97 % of what the best of rank 64 keeps
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


@dataclass(frozen=True, slots=True)
class Batch:
    """Matrices X of one batch: a pass over their strips, and Σ r_i of each, (modules,) int64, on the CPU."""

    strips: Strips
    rank_sums: Tensor


def truncate(
    strips: Strips, short: int, policy: RankPolicy, rank_sums: Tensor, seed: int, *, singular: bool = False
) -> Truncated:
    """Thin factors of a batch of matrices (long, short), at the ranks the policy chooses for rank sums (modules,).

    singular: by singular vectors, even where nothing is cut and other factors are quicker.
    """
    return next(truncate_each([Batch(strips, rank_sums)], short, policy, seed, singular=singular))


def truncate_each(
    batches: Sequence[Batch], short: int, policy: RankPolicy, seed: int, *, singular: bool = False
) -> Iterator[Truncated]:
    """`truncate` of several batches of one short side; what is `short` × `short` of all of them at once.

    A GPU takes as long for the eigenvalues of a few matrices as for those of all. Each is made when it is asked for.
    """
    width = _width(batches, short, policy)
    if width != short and short > EXACT_LIMIT:
        for batch in batches:
            if short <= GRAM_LIMIT or width >= short // 2:
                spectrum = _leading_spectrum(batch.strips, short, width, seed)
            else:
                spectrum = _spectrum_within(batch.strips, _sketch(batch.strips, short, width, seed))
            yield from _cut([batch], spectrum, policy)
        return
    grams = [_gram(batch.strips, torch.float64) for batch in batches]
    quick = grams[0].is_cuda and not singular
    whole = _uncut(batches, grams, policy) if quick else [None] * len(batches)
    cuts: Iterator[Truncated] = iter(())
    if some := [index for index, found in enumerate(whole) if found is None]:
        spectrum = _full_spectrum(torch.cat([grams[index] for index in some]) if len(some) > 1 else grams[some[0]])
        cuts = _cut([batches[index] for index in some], spectrum, policy)
    for batch, gram, transform in zip(batches, grams, whole, strict=True):
        yield next(cuts) if transform is None else _turned(batch.strips, gram, transform)


def _width(batches: Sequence[Batch], short: int, policy: RankPolicy) -> int:
    """Columns of the subspace that the largest rank any matrix may keep asks for."""
    limits = [policy.limits(batch.rank_sums) for batch in batches]
    bounds = [int(limit.max()) for limit in limits if limit is not None]
    return min(short, max(bounds) + OVERSAMPLING) if bounds else short


def _cut(batches: Sequence[Batch], spectrum: Spectrum, policy: RankPolicy) -> Iterator[Truncated]:
    """By the leading singular vectors, at the ranks the policy chooses. spectrum: of all batches, one after the other."""
    device, sizes = spectrum.values.device, [len(batch.rank_sums) for batch in batches]
    sums = torch.cat([batch.rank_sums for batch in batches]).to(device, non_blocking=True)
    ranks = policy.choose(spectrum.values, spectrum.total, sums)
    exact = ranks >= spectrum.numerical
    mask = torch.arange(spectrum.values.shape[1], device=device) < ranks[:, None]
    values = torch.where(mask, spectrum.values, 0.0)
    root = values.pow(0.25)  # √σ
    vectors = spectrum.vectors * mask[:, None, :]
    transform = vectors * torch.where(mask, 1 / root, 0.0)[:, None, :]
    short = vectors * root[:, None, :]
    norm = values.sum(-1)
    energy = torch.where(spectrum.total > 0, norm / spectrum.total, 1.0).clamp_max(1)
    norm = norm.sqrt()
    largest = torch.stack([some.max() for some in torch.split(ranks, sizes)]).tolist()
    start = 0
    for batch, size, most in zip(batches, sizes, largest, strict=True):
        mine, kept = slice(start, start + size), slice(max(1, most))  # a column of zeros where there is nothing
        long = _times(batch.strips, transform[mine, :, kept])
        yield Truncated(long, short[mine, :, kept], ranks[mine], exact[mine], norm[mine], energy[mine])
        start += size


def _times(strips: Strips, transform: Tensor) -> Tensor:
    """X @ transform, in the dtype of X."""
    parts = [strip @ transform.to(strip.dtype) for strip in strips()]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _uncut(batches: Sequence[Batch], grams: Sequence[Tensor], policy: RankPolicy) -> list[Tensor | None]:
    """L⁻ᵀ of XᵀX / tr XᵀX = L Lᵀ for batches where nothing is to be cut and every X has full rank, else None.

    X = (X L⁻ᵀ) Lᵀ takes no spectrum; eigenvalues take a GPU much longer than they take a CPU. Columns of zeros, which
    entrywise rules leave, are left out, and there are as many columns of zeros at the end.
    """
    found: list[Tensor | None] = [None] * len(batches)
    short = grams[0].shape[-1]
    if policy.energy is not None or short > EXACT_LIMIT:
        return found
    limits = [policy.limits(batch.rank_sums) for batch in batches]
    whole = [index for index, limit in enumerate(limits) if limit is None or not bool((limit < short).any())]
    if not whole:
        return found
    scaled = []
    for index in whole:
        total = grams[index].diagonal(dim1=-2, dim2=-1).sum(-1)
        scaled.append(grams[index] / total.clamp_min(torch.finfo(total.dtype).tiny)[:, None, None])
    every = torch.cat(scaled)
    lacking = every.diagonal(dim1=-2, dim2=-1) == 0
    inverse, regular = inverse_cholesky_each(every + torch.diag_embed(lacking.to(every)))
    order = lacking.byte().argsort(dim=-1, stable=True)
    inverse = inverse.masked_fill_(lacking[:, :, None], 0.0).gather(1, order[:, :, None].expand_as(inverse))
    sizes = [len(gram) for gram in scaled]
    good = torch.stack([some.all() for some in torch.split(regular, sizes)]).tolist()
    for index, lower, fits in zip(whole, torch.split(inverse, sizes), good, strict=True):
        if fits:
            found[index] = lower.mT
    return found


def _turned(strips: Strips, gram: Tensor, transform: Tensor) -> Truncated:
    """X = (X T) (XᵀX T)ᵀ, with columns of equal length in both factors, as √σ would have on average."""
    squares = gram.diagonal(dim1=-2, dim2=-1)
    ranks, norm = squares.count_nonzero(-1), squares.sum(-1).sqrt()
    size = torch.where(norm > 0, norm, 1.0)
    root = (size.square() / ranks.clamp_min(1)).pow(0.25)[:, None, None]
    transform = transform / size[:, None, None]
    one = torch.ones_like(norm)
    long = _times(strips, transform * root)
    return Truncated(long, gram @ transform / root, ranks, one > 0, norm, one, singular=False)


def _gram(strips: Strips, dtype: torch.dtype) -> Tensor:
    gram: Tensor | None = None
    for strip in strips():
        wide = strip.to(dtype)
        gram = wide.mT @ wide if gram is None else gram.baddbmm_(wide.mT, wide)
        turns.between()
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
    start = _start(short, width, seed).to(gram.device, non_blocking=True).to(gram.dtype).expand(gram.shape[0], -1, -1)

    def iterated(regular: list[Tensor] | None) -> Tensor:
        subspace = start
        for step in range(GRAM_ITERATIONS):
            image = gram @ subspace
            if step % 2:
                subspace = _orthonormal(image, regular)
            else:
                subspace = image / torch.linalg.vector_norm(image, dim=(-1, -2), keepdim=True).clamp_min(1e-30)
        return subspace

    subspace = _trusted(iterated)
    values, rotation = descending_eigh(subspace.mT @ gram @ subspace)
    ranks = numerical_rank(values)
    # A rank that fills the subspace may be larger outside it.
    return Spectrum(subspace @ rotation, values, total, torch.where(ranks < width, ranks, short))


@lru_cache(maxsize=8)
def _start(short: int, width: int, seed: int) -> Tensor:
    """(short, width) of a normal distribution, on the CPU, where it takes as long as a batch takes a GPU."""
    return torch.randn(short, width, generator=torch.Generator().manual_seed(seed))


def _sketch(strips: Strips, short: int, width: int, seed: int) -> Tensor:
    """Subspace iteration on XᵀX from a seeded start (Halko, Martinsson, Tropp, arXiv:0909.4061, algorithm 4.4)."""
    start = _start(short, width, seed)

    def iterated(regular: list[Tensor] | None) -> Tensor:
        subspace: Tensor | None = None
        for _ in range(POWER_ITERATIONS):
            image: Tensor | None = None
            for strip in strips():
                if subspace is None:
                    subspace = start.to(strip.device, non_blocking=True).to(strip.dtype).expand(strip.shape[0], -1, -1)
                product = strip.mT @ (strip @ subspace)
                image = product if image is None else image.add_(product)
            assert image is not None
            subspace = _orthonormal(image, regular)
        assert subspace is not None
        return subspace

    return _trusted(iterated)


def _trusted(iterated: Callable[[list[Tensor] | None], Tensor]) -> Tensor:
    """What is iterated with the quick bases of `_orthonormal` if all of them were good, else with exact ones."""
    regular: list[Tensor] = []
    found = iterated(regular)
    if regular and not bool(torch.stack(regular).all()):  # the one wait for a GPU
        return iterated(None)
    return found


def _orthonormal(columns: Tensor, regular: list[Tensor] | None) -> Tensor:
    """An orthonormal basis of the columns (modules, d, k); on a GPU by Cholesky, whose `qr` takes the modules one by one.

    regular: takes up whether that was possible; exact without it.
    """
    if columns.is_cuda and regular is not None:
        scaled = columns / torch.linalg.vector_norm(columns, dim=1, keepdim=True).clamp_min(1e-30)
        wide = scaled.double()
        lower, good = inverse_cholesky_each(wide.mT @ wide)
        regular.append(good.all())
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
