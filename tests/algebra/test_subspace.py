# SPDX-License-Identifier: Apache-2.0
"""Leading eigenvectors by iteration, against the eigenvalue solver."""

from __future__ import annotations

from itertools import accumulate, pairwise, starmap

import pytest
import torch
from torch import Tensor

from vllm_merge.algebra import tucker
from vllm_merge.algebra.subspace import WAYS, Way, follow, settled
from vllm_merge.algebra.symmetric import descending_eigh
from vllm_merge.algebra.tucker import shared_bases

ROWS, WANTED = 96, 12


def matrices(spectrum: Tensor, count: int = 3) -> Tensor:
    """Random symmetric matrices with these eigenvalues."""
    generator = torch.Generator().manual_seed(3)
    bases = torch.linalg.qr(torch.randn(count, ROWS, ROWS, generator=generator, dtype=torch.float64)).Q
    return bases * spectrum @ bases.mT


def nearby(exact: Tensor) -> Tensor:
    """The leading eigenvectors of a matrix that is a little off."""
    generator = torch.Generator().manual_seed(4)
    noise = torch.randn(exact.shape, generator=generator, dtype=torch.float64) * 1e-3 * exact.abs().amax()
    return descending_eigh(exact + noise @ noise.mT)[1][:, :, :WANTED].contiguous()


def followed(exact: Tensor, near: Tensor, way: Way) -> tuple[Tensor, Tensor]:
    """The subspaces, and what is measured of them."""
    found, measured = torch.empty_like(near), near.new_empty(4, len(near))
    follow(exact, near, way, found, measured)
    return found, measured


def projector(vectors: Tensor) -> Tensor:
    return vectors @ vectors.mT


@pytest.mark.parametrize(
    ("spectrum", "way"),
    [
        (torch.cat([torch.ones(WANTED), torch.full((ROWS - WANTED,), 0.05)]).double(), WAYS[0]),
        (torch.cat([torch.linspace(1, 0.2, WANTED), torch.linspace(0.02, 0, ROWS - WANTED)]).double(), WAYS[0]),
        (torch.cat([torch.linspace(1, 0.5, WANTED), torch.full((ROWS - WANTED,), 0.25)]).double(), WAYS[1]),
    ],
    ids=["equal", "decaying", "near"],
)
def test_it_finds_what_the_solver_finds(spectrum: Tensor, way: Way) -> None:
    exact = matrices(spectrum)
    found, measured = followed(exact, nearby(exact), way)
    assert settled(measured).all()
    torch.testing.assert_close(measured[0], spectrum[:WANTED].sum().expand(3), rtol=0, atol=1e-12)
    expected = projector(descending_eigh(exact)[1][:, :, :WANTED])
    torch.testing.assert_close(projector(found), expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(found.mT @ found, torch.eye(WANTED).double().expand(3, -1, -1), rtol=0, atol=1e-12)


def test_columns_of_zeros_stay_zero() -> None:
    spectrum = torch.cat([torch.ones(WANTED - 4), torch.full((ROWS - WANTED + 4,), 0.01)]).double()
    exact = matrices(spectrum)
    near = nearby(exact)
    near[:, :, WANTED - 4 :] = 0
    found, measured = followed(exact, near, WAYS[0])
    assert settled(measured).all()
    assert (found[:, :, WANTED - 4 :] == 0).all()
    torch.testing.assert_close(measured[0], torch.full((3,), WANTED - 4.0).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "exact",
    [
        torch.zeros(2, ROWS, ROWS).double(),
        torch.full((2, ROWS, ROWS), torch.nan).double(),
        matrices(torch.cat([torch.ones(4), torch.zeros(ROWS - 4)]).double()),  # of fewer dimensions than are wanted
        matrices(torch.linspace(1, 1 - 1e-4, ROWS, dtype=torch.float64)),  # flat: it takes more products
    ],
    ids=["zero", "nan", "few dimensions", "flat"],
)
@pytest.mark.parametrize("way", WAYS)
def test_what_it_cannot_find_is_not_called_right(exact: Tensor, way: Way) -> None:
    near = torch.linalg.qr(torch.randn(ROWS, WANTED, generator=torch.Generator().manual_seed(1)).double()).Q
    assert not settled(followed(exact, near.expand(len(exact), -1, -1), way)[1]).any()


def slots_of(widths: list[int]) -> list[slice]:
    ends = list(accumulate(widths, initial=0))
    return list(starmap(slice, pairwise(ends)))


def problem(
    count: int, alike: float = 0.0, decay: float = 0.0, tasks: int = 4, rank: int = 6
) -> tuple[Tensor, Tensor, list[slice]]:
    """Tasks of `rank` as shared_bases takes them, alike to one another, with singular values that decay by decades."""
    generator = torch.Generator().manual_seed(5)
    size = tasks * rank
    sides = []
    for _ in range(2):
        common = torch.randn(count, 4 * size, rank, generator=generator).double().repeat(1, 1, tasks)
        own = torch.randn(count, 4 * size, size, generator=generator).double()
        both = (alike * common + (1 - alike**2) ** 0.5 * own) * torch.logspace(0, -decay, rank).double().repeat(tasks)
        sides.append(torch.linalg.qr(both).R)
    return sides[0], sides[1].mT, slots_of([rank] * tasks)


@pytest.mark.parametrize(("alike", "decay"), [(0.0, 0.0), (0.0, 1.0), (0.3, 0.3), (0.9, 0.5)])
@pytest.mark.parametrize("ranks", [[6, 6, 6], [6, 2, 1]])
def test_shared_bases_are_those_of_the_eigenvalue_solver(
    alike: float, decay: float, ranks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Iteration for iteration, with one module of zeros among them."""
    left, right, slots = problem(4, alike, decay)
    right[1] = 0
    given = (left, right, slots, torch.tensor([*ranks, 6]), 1e-6)
    found = tucker.shared_bases(*given)
    monkeypatch.setattr(tucker, "WAYS", ())
    expected = tucker.shared_bases(*given)
    for here, there in zip(found, expected, strict=True):
        assert (here[1] == 0).all()
        assert torch.equal(here.abs().sum(1) > 0, there.abs().sum(1) > 0)
        torch.testing.assert_close(projector(here), projector(there), rtol=0, atol=1e-7)
        torch.testing.assert_close(here.abs(), there.abs(), rtol=0, atol=1e-5)  # each vector, strongest first


def test_tasks_of_unlike_width_are_those_of_one_width_with_zeros() -> None:
    left, right, slots = problem(3)
    left[:, :, 1:6] = 0  # all of the first task but one term
    right[:, 8:12] = 0  # all of the second but two
    used = [0, *range(6, 8), *range(12, 24)]
    ranks = torch.full((3,), 6)
    expected = shared_bases(left, right, slots, ranks, 1e-9)
    found = shared_bases(left[:, :, used], right[:, used], slots_of([1, 2, 6, 6]), ranks, 1e-9)
    for here, there in zip(found, expected, strict=True):
        torch.testing.assert_close(projector(here), projector(there), rtol=0, atol=1e-7)


def test_most_halves_need_no_eigenvalue_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    halves: list[int] = []
    exact = tucker._exact

    def counting(matrices: Tensor, ranks: Tensor, width: int) -> tuple[Tensor, Tensor]:
        halves.append(len(matrices))
        return exact(matrices, ranks, width)

    monkeypatch.setattr(tucker, "_exact", counting)
    left, right, slots = problem(3)
    tucker.shared_bases(left, right, slots, torch.full((3,), 6), 1e-9)
    few = sum(halves)
    halves.clear()
    monkeypatch.setattr(tucker, "WAYS", ())
    tucker.shared_bases(left, right, slots, torch.full((3,), 6), 1e-9)
    assert few < sum(halves) / 4


def test_a_basis_that_is_not_the_leading_one_is_replaced() -> None:
    exact = matrices(torch.cat([torch.ones(WANTED), torch.full((ROWS - WANTED,), 0.5)]).double())
    vectors = descending_eigh(exact)[1]
    ranks = torch.full((3,), WANTED)
    wrong = vectors[:, :, 1 : WANTED + 1]
    found = tucker._resolved(exact, wrong, ranks)
    torch.testing.assert_close(projector(found), projector(vectors[:, :, :WANTED]), rtol=0, atol=1e-9)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_shared_bases_are_the_same_on_a_gpu() -> None:
    generator = torch.Generator().manual_seed(5)
    count, tasks, rank = 5, 8, 16
    size = tasks * rank
    decay = torch.logspace(0, -2, rank, dtype=torch.float64).repeat(tasks)
    left = torch.randn(count, size, size, generator=generator, dtype=torch.float64) * decay
    right = torch.randn(count, size, size, generator=generator, dtype=torch.float64)
    slots = slots_of([rank] * tasks)
    ranks = torch.full((count,), rank)
    expected = shared_bases(left, right, slots, ranks, 1e-6)
    found = shared_bases(left.cuda(), right.cuda(), slots, ranks.cuda(), 1e-6)
    for here, there in zip(expected, found, strict=True):
        torch.testing.assert_close(there.cpu() @ there.cpu().mT, here @ here.mT, rtol=0, atol=1e-7)
