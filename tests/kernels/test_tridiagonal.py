# SPDX-License-Identifier: Apache-2.0
"""Eigendecompositions of batches in one kernel against LAPACK's: spectra flat, decaying and with a null space, of any size."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.kernels.running import checks_of, interpret, on_a_gpu, run_all


def with_spectrum(spectrum: Tensor, batch: int, generator: torch.Generator) -> Tensor:
    """Random symmetric matrices (batch, k, k) with these eigenvalues, scaled so that the largest diagonal entry of each is 1."""
    k = spectrum.shape[0]
    basis = torch.linalg.qr(torch.randn(batch, k, k, generator=generator, dtype=torch.float64)).Q
    matrices = basis @ torch.diag_embed(spectrum.double()) @ basis.mT
    matrices = (matrices + matrices.mT) / 2
    return matrices / matrices.diagonal(dim1=-2, dim2=-1).amax(-1)[:, None, None]


def check(matrices: Tensor, device: str) -> None:
    """Values, the largest first, vectors and what they multiply to, to within 1e-11 of the largest entry of each matrix."""
    from vllm_merge.kernels import tridiagonal

    k = matrices.shape[-1]
    values, vectors, right = (part.cpu() for part in tridiagonal.eigh(matrices.to(device)))
    size = matrices.abs().amax((1, 2))[:, None]
    assert right.all()
    assert (values.diff(dim=-1) <= 0).all()
    assert ((values.flip(-1) - torch.linalg.eigvalsh(matrices)).abs() <= 1e-11 * size).all()
    assert (vectors.mT @ vectors - torch.eye(k, dtype=torch.float64)).abs().max() < 1e-11
    assert ((vectors @ torch.diag_embed(values) @ vectors.mT - matrices).abs() <= 1e-11 * size[:, None]).all()


SIZES = {"cpu": (1, 3, 6, 13), "cuda": (1, 2, 3, 4, 5, 8, 13, 16, 32, 33, 63, 64, 65, 100, 127, 128)}


def check_in_turns(device: str) -> None:
    """The same values and vectors, to the bit, where others get their turn between the pieces."""
    from vllm_merge.kernels import tridiagonal, turns

    generator = torch.Generator().manual_seed(5)
    batch = 3 if device == "cpu" else 300  # more than there are multiprocessors
    matrices = with_spectrum(torch.linspace(1, 5, 5), batch, generator).to(device)
    rests: list[int] = []
    with turns.taking_turns(lambda: rests.append(1)):
        taken = tridiagonal.eigh(matrices)
    number = len(rests)
    assert number >= 4
    assert number % 2 == 0
    at_once = tridiagonal.eigh(matrices)
    assert len(rests) == number
    assert all(torch.equal(one, other) for one, other in zip(taken, at_once, strict=True))


def check_full_rank(device: str) -> None:
    """Gram matrices of random rows."""
    generator = torch.Generator().manual_seed(0)
    for k in SIZES[device]:
        rows = torch.randn(3, k, 4 * k, generator=generator, dtype=torch.float64)
        grams = rows @ rows.mT
        check(grams / grams.diagonal(dim1=-2, dim2=-1).amax(-1)[:, None, None], device)


def check_decaying_spectra(device: str) -> None:
    """Eigenvalues over twelve decades, in no order."""
    generator = torch.Generator().manual_seed(1)
    for k in SIZES[device]:
        spectrum = torch.logspace(0, -12, k, dtype=torch.float64)[torch.randperm(k, generator=generator)]
        check(with_spectrum(spectrum, 2, generator), device)


def check_low_rank(device: str) -> None:
    """A null space of half the size, and of all but one."""
    generator = torch.Generator().manual_seed(2)
    for k in SIZES[device]:
        for rank in {1, max(1, k // 2)}:
            spectrum = torch.zeros(k, dtype=torch.float64)
            spectrum[:rank] = torch.linspace(1, 2, rank)
            check(with_spectrum(spectrum, 2, generator), device)


def check_equal_eigenvalues(device: str) -> None:
    """The identity, two clusters, and a diagonal that is sorted the other way round."""
    generator = torch.Generator().manual_seed(3)
    for k in (6, 8):
        check(torch.eye(k, dtype=torch.float64).expand(2, k, k).contiguous(), device)
        check(with_spectrum(torch.tensor([1.0] * (k // 2) + [0.25] * (k // 2)), 2, generator), device)
        check(torch.diag(torch.linspace(0.01, 1, k, dtype=torch.float64))[None], device)


def check_indefinite(device: str) -> None:
    """Eigenvalues of both signs, and a matrix that is tridiagonal already."""
    generator = torch.Generator().manual_seed(4)
    for k in SIZES[device]:
        either = torch.randn(2, k, k, generator=generator, dtype=torch.float64)
        either = either + either.mT
        check(either / either.abs().amax((1, 2))[:, None, None], device)
        beside = torch.diag(torch.ones(k - 1, dtype=torch.float64), 1)
        check((torch.eye(k, dtype=torch.float64) - 0.5 * (beside + beside.mT))[None], device)


def check_any_magnitude(device: str) -> None:
    """From next to nothing to the largest there is, and zero; of a batch that is a part of another, turned and strided."""
    generator = torch.Generator().manual_seed(6)
    for k in SIZES[device]:
        for size in (0.0, 1e-300, 1e-20, 1e20, 1e300):
            check(size * with_spectrum(torch.linspace(1, 2, k), 2, generator), device)
        wide = with_spectrum(torch.linspace(1, 2, k + 3), 5, generator).mT
        check(wide[1::2, :k, :k], device)


def check_what_is_wrong_is_told(device: str) -> None:
    """Of vectors that are not those of the matrix, or not orthonormal: whatever made them said that it had converged."""
    from vllm_merge.kernels import tridiagonal

    generator = torch.Generator().manual_seed(7)
    for k in SIZES[device]:
        matrices = (3 * with_spectrum(torch.linspace(1, 2, k), 5, generator)).to(device)
        diagonal, rows, scales, converged = tridiagonal.diagonalized(matrices)
        rows[1, 0] *= 1 + 1e-9  # no longer of length 1
        diagonal[2, k - 1] += 1e-9
        converged[3] = 0
        scales[4] = torch.nan
        vectors = rows[:, :k, :k]
        found = tridiagonal.ordered(
            diagonal, rows, scales, converged, vectors @ matrices, vectors @ vectors.mT.contiguous()
        )
        assert found[2].tolist() == [1, 0, 0, 0, 0]


def check_what_is_not_finite_is_told(device: str) -> None:
    """It has not converged; its neighbour has."""
    from vllm_merge.kernels import tridiagonal

    matrices = with_spectrum(torch.linspace(0.5, 1, 8), 2, torch.Generator().manual_seed(5))
    matrices[0, 2, 3] = matrices[0, 3, 2] = torch.nan
    assert tridiagonal.eigh(matrices.to(device))[2].tolist() == [0, 1]


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("check", checks_of(globals()))
def test_on_a_gpu(check: Callable[[str], None]) -> None:
    check("cuda")


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("rows", [1, 2, 7, 16, 48, 64, 100, 128, 140])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_caller_sorts_and_scales(rows: int, dtype: torch.dtype) -> None:
    """Largest first, of matrices of any size and magnitude, one of them zero."""
    from vllm_merge.algebra.symmetric import descending_eigh

    generator = torch.Generator().manual_seed(rows)
    wide = torch.randn(5, rows, 2 * rows, generator=generator, dtype=torch.float64)
    matrices = wide @ wide.mT * torch.logspace(-6, 6, 5, dtype=torch.float64)[:, None, None]
    matrices[3] = 0
    matrices = matrices.to(dtype)
    values, vectors = (part.double().cpu() for part in descending_eigh(matrices.cuda()))
    matrices = matrices.double()
    expected = torch.linalg.eigvalsh(matrices).clamp_min(0).flip(-1)
    allowed = (1e-5 if dtype == torch.float32 else 1e-11) * expected[:, :1] + 1e-30
    assert ((values - expected).abs() <= allowed).all()
    assert ((vectors @ torch.diag_embed(values) @ vectors.mT - matrices).abs() <= 10 * allowed[:, :, None]).all()


def test_in_tritons_interpreter() -> None:
    interpret("tests.kernels.test_tridiagonal", globals())


if __name__ == "__main__":
    run_all(globals())
