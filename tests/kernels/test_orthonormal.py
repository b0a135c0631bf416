# SPDX-License-Identifier: Apache-2.0
"""Orthonormal columns in one kernel: what they span, columns of zeros, and what is measured on the way."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.kernels.running import both_ways, run_all

SHAPES = {
    "cpu": ((5, 3), (20, 1), (24, 8)),
    "cuda": ((5, 3), (20, 1), (24, 8), (128, 16), (128, 64), (256, 32), (100, 37)),
}


def columns(rows: int, wide: int, seed: int = 0, least: float = 1e-9) -> Tensor:
    """Columns of unlike size, neither orthogonal nor nearly dependent, the last but one of zeros where there are three.

    least: size of the last, where that of the first is 1.
    """
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(3, rows, wide, generator=generator, dtype=torch.float64)
    made *= least ** torch.linspace(0, 1, wide, dtype=torch.float64)
    if wide > 2:
        made[:, :, -2] = 0
    return made


def leading_spans(basis: Tensor, exact: Tensor) -> float:
    """How far the first k columns of one are from spanning what the first k of the other do, for the worst k."""
    pairs = [(basis[:, :, :k], exact[:, :, :k]) for k in range(1, basis.shape[2] + 1)]
    return max(float((one @ one.mT - two @ two.mT).abs().max()) for one, two in pairs)


def by_householder(given: Tensor) -> Tensor:
    """The same by another algorithm, a column of zeros left out."""
    there = given.abs().sum(1) > 0
    basis = torch.zeros_like(given)
    basis[:, :, there[0]] = torch.linalg.qr(given[:, :, there[0]]).Q
    return basis


def check_the_first_columns_span_what_they_did(device: str) -> None:
    from vllm_merge.kernels.orthonormal import fits, orthonormalize

    for rows, wide in SHAPES[device]:
        given = columns(rows, wide)
        assert fits(rows, wide)
        found = orthonormalize(given.to(device)).cpu()
        assert leading_spans(found, by_householder(given)) < 1e-9
        assert wide <= 2 or (found[:, :, -2] == 0).all()
    assert not fits(512, 64)


def check_a_step_of_subspace_iteration(device: str) -> None:
    from vllm_merge.kernels.orthonormal import advance

    for rows, wide in SHAPES[device]:
        # Eigenvalues that decay further would make the columns of the image nearly dependent: no algorithm has their span.
        given, root = columns(rows, wide), columns(rows, rows, 1, least=1e-2)
        matrix = root @ root.mT
        found, measured = torch.empty_like(given).to(device), torch.empty(4, 3, dtype=torch.float64, device=device)
        advance(given.to(device), (matrix @ given).to(device), found, measured)
        y = by_householder(given)
        image = matrix @ y
        assert leading_spans(found.cpu(), by_householder(image)) < 1e-9
        values = (y.mT @ image).diagonal(dim1=-2, dim2=-1)
        there = torch.where(y.abs().sum(1) > 0, values, torch.inf)
        away = torch.linalg.matrix_norm(image - y @ y.mT @ image)
        expected = torch.stack([values.sum(-1), away, values.amax(-1), there.amin(-1)])
        torch.testing.assert_close(measured.cpu(), expected, rtol=1e-9, atol=1e-12)


def check_what_is_not_finite_is_told(device: str) -> None:
    from vllm_merge.kernels.orthonormal import advance

    given = columns(5, 3).to(device)
    image = given.clone()
    image[1, 2, 0] = torch.nan
    found, measured = torch.empty_like(given), torch.empty(4, 3, dtype=torch.float64, device=device)
    advance(given, image, found, measured)
    assert measured[1].isnan().tolist() == [False, True, False]


test_in_tritons_interpreter, test_on_a_gpu = both_ways("tests.kernels.test_orthonormal", globals())


if __name__ == "__main__":
    run_all(globals())
