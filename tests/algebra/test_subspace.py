# SPDX-License-Identifier: Apache-2.0
"""Leading eigenvectors by iteration, against the eigenvalue solver."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vllm_merge.algebra.subspace import iterate
from vllm_merge.algebra.symmetric import descending_eigh
from vllm_merge.algebra.tucker import shared_bases

ROWS, WANTED = 96, 12


def matrices(spectrum: Tensor, count: int = 3) -> Tensor:
    """Random symmetric matrices with these eigenvalues."""
    generator = torch.Generator().manual_seed(3)
    bases = torch.linalg.qr(torch.randn(count, ROWS, ROWS, generator=generator, dtype=torch.float64)).Q
    return bases * spectrum @ bases.mT


def nearby(exact: Tensor) -> Tensor:
    """The leading eigenvectors of a matrix that is a little off, twice as many as are wanted."""
    generator = torch.Generator().manual_seed(4)
    noise = torch.randn(exact.shape, generator=generator, dtype=torch.float64) * 1e-3 * exact.abs().amax()
    return descending_eigh(exact + noise @ noise.mT)[1][:, :, : 2 * WANTED]


def projector(vectors: Tensor) -> Tensor:
    return vectors[:, :, :WANTED] @ vectors[:, :, :WANTED].mT


@pytest.mark.parametrize(
    "spectrum",
    [
        torch.logspace(0, -4, ROWS, dtype=torch.float64),
        1 / torch.arange(1, ROWS + 1, dtype=torch.float64),
        torch.cat([torch.ones(WANTED), torch.full((ROWS - WANTED,), 0.1)]).double(),  # equal ones among the wanted
    ],
    ids=["decaying", "slow", "equal"],
)
def test_it_finds_what_the_solver_finds(spectrum: Tensor) -> None:
    exact = matrices(spectrum)
    values, vectors, settled = iterate(exact, nearby(exact), WANTED)
    assert settled.all()
    torch.testing.assert_close(values[:, :WANTED], spectrum[:WANTED].expand(3, -1), rtol=0, atol=1e-9)
    expected = projector(descending_eigh(exact)[1])
    torch.testing.assert_close(projector(vectors), expected, rtol=0, atol=1e-8)


def test_a_matrix_of_few_dimensions_is_right_or_said_to_be_open() -> None:
    spectrum = torch.cat([torch.ones(4), torch.zeros(ROWS - 4)]).double()
    exact = matrices(spectrum)
    values, vectors, settled = iterate(exact, nearby(exact), WANTED)
    for index in settled.nonzero()[:, 0]:
        there = vectors[index, :, :4] @ vectors[index, :, :4].mT
        torch.testing.assert_close(there, exact[index], rtol=0, atol=1e-8)
        torch.testing.assert_close(values[index, :WANTED], spectrum[:WANTED], rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "exact", [torch.zeros(2, ROWS, ROWS).double(), torch.full((2, ROWS, ROWS), torch.nan).double()]
)
def test_what_has_no_answer_is_not_called_right(exact: Tensor) -> None:
    near = torch.eye(ROWS, 2 * WANTED, dtype=torch.float64).expand(2, -1, -1)
    assert not iterate(exact, near, WANTED)[2].any()


def test_what_needs_more_steps_is_not_called_right() -> None:
    flat = matrices(torch.linspace(1, 1 - 1e-4, ROWS, dtype=torch.float64))
    start = torch.eye(ROWS, 2 * WANTED, dtype=torch.float64).expand(3, -1, -1)
    assert not iterate(flat, start, WANTED)[2].any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_shared_bases_are_the_same_on_a_gpu() -> None:
    generator = torch.Generator().manual_seed(5)
    count, tasks, rank = 5, 8, 16
    size = tasks * rank
    decay = torch.logspace(0, -2, rank, dtype=torch.float64).repeat(tasks)
    left = torch.randn(count, size, size, generator=generator, dtype=torch.float64) * decay
    right = torch.randn(count, size, size, generator=generator, dtype=torch.float64)
    same = torch.kron(torch.eye(tasks), torch.ones(rank, rank)).double()
    given = (left, right, same, torch.full((count,), rank))
    expected = shared_bases(*given, 1e-6)
    found = shared_bases(*(part.cuda() for part in given), 1e-6)
    for here, there in zip(expected, found, strict=True):
        torch.testing.assert_close(there.cpu() @ there.cpu().mT, here @ here.mT, rtol=0, atol=1e-7)
