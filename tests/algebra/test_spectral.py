# SPDX-License-Identifier: Apache-2.0
"""Polar factors and flat spectra, by products alone and by singular vectors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vllm_merge.algebra import spectral
from vllm_merge.algebra.spectral import (
    Triples,
    isotropic,
    leading_of_each,
    polar,
    polar_by_products,
    polar_of_each,
    polar_of_full_rank,
    ranks_of_each,
    triples_of,
    triples_of_each,
)


def with_singular_values(values: Tensor, rows: int, count: int = 2) -> tuple[Tensor, Tensor]:
    """Matrices (count, rows, k) with these singular values, and their polar factors."""
    generator = torch.Generator().manual_seed(2)
    k = len(values)
    u = torch.linalg.qr(torch.randn(count, rows, k, generator=generator, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(count, k, k, generator=generator, dtype=torch.float64)).Q
    return u * values @ v.mT, u @ v.mT


@pytest.mark.parametrize("rows", [24, 40])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("least", [1.0, 1e-2, 1e-4])
def test_polar_factors_by_products(rows: int, scale: float, least: float) -> None:
    matrix, expected = with_singular_values(torch.linspace(1, least, 24, dtype=torch.float64), rows)
    found, right = polar_of_full_rank(matrix * scale)
    assert right.all()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14 / least)


def test_a_singular_value_that_is_too_small_is_told() -> None:
    matrix, _ = with_singular_values(torch.ones(6).double(), 8, count=5)
    nearly, lacking = with_singular_values(torch.tensor([1, 1, 1, 1, 1, 1e-6]).double(), 8)[0]
    matrix[1], matrix[2], matrix[3] = nearly, 0, torch.cat([lacking[:, :5], lacking[:, :1]], -1)
    assert polar_of_full_rank(matrix)[1].tolist() == [True, False, False, False, True]


@pytest.mark.parametrize("rows", [24, 40])
def test_nearly_singular_ones_take_more_products(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And those that lack a dimension beside them, or all, the eigenvalue solver."""
    left: list[int] = []
    on_support = spectral._polar_on_support

    def counting(matrix: Tensor) -> Tensor:
        left.append(len(matrix))
        return on_support(matrix)

    monkeypatch.setattr(spectral, "_polar_on_support", counting)
    several = [with_singular_values(torch.tensor([1.0] * 23 + [least]).double(), rows, 1) for least in (1, 1e-5, 5e-6)]
    lacking = torch.stack(
        [with_singular_values(torch.tensor([1.0] * 23 + [least]).double(), rows, 1)[0][0] for least in (1e-6, 0)]
    )
    matrix = torch.cat([*(one for one, _ in several), lacking, torch.zeros(1, rows, 24).double()])
    found = polar_by_products(matrix)
    torch.testing.assert_close(found[:3], torch.cat([factor for _, factor in several]), rtol=0, atol=1e-9)
    torch.testing.assert_close(found[3:], on_support(matrix[3:]), rtol=0, atol=0)
    assert left == [3]


@pytest.mark.parametrize("shape", [(8, 6), (6, 8), (6, 6)])
def test_a_flat_spectrum_has_the_mean_on_the_support(shape: tuple[int, int]) -> None:
    values = torch.tensor([5.0, 3, 1, 0, 0, 0]).double()
    tall, _ = with_singular_values(values, max(shape))
    matrix = tall if shape[0] >= shape[1] else tall.mT
    matrix[1] = 0
    found = isotropic(matrix)
    u, _, vt = torch.linalg.svd(matrix[0])
    torch.testing.assert_close(found[0], 3 * u[:, :3] @ vt[:3], rtol=0, atol=1e-12)
    torch.testing.assert_close(found[0], 3 * polar(matrix)[0], rtol=0, atol=1e-12)
    assert (found[1] == 0).all()


def test_leading_triples() -> None:
    matrix, _ = with_singular_values(torch.tensor([5.0, 3, 1]).double(), 4)
    count = torch.tensor([1, 2])
    wide, narrow = (triples_of(matrix).leading(count, most) for most in (None, 2))
    assert isinstance(narrow, Triples)
    assert [tuple(part.shape) for part in (wide.U, narrow.U, narrow.S, narrow.V)] == [
        (2, 4, 3),
        (2, 4, 2),
        (2, 2),
        (2, 3, 2),
    ]
    assert narrow.rank.tolist() == wide.rank.tolist() == [1, 2]
    torch.testing.assert_close(
        narrow.U @ torch.diag_embed(narrow.S) @ narrow.V.mT, wide.U * wide.S[:, None] @ wide.V.mT
    )


@pytest.mark.parametrize("widths", [(3, 3, 3), (2, 4, 1)])
def test_triples_of_several_tasks_at_once(widths: tuple[int, ...]) -> None:
    """Each as alone, cut to its own count, and changed as it is asked for; of one width and of several."""
    generator = torch.Generator().manual_seed(5)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tasks = [(random(2, 9, width), random(2, width, 8)) for width in widths]
    tasks[0][0][1, :, 1:] = 0
    alone = [spectral.triples_of_product(*task) for task in tasks]
    each = triples_of_each(tasks)
    for one, other in zip(each, alone, strict=True):
        torch.testing.assert_close(one.U * one.S[:, None] @ one.V.mT, other.U * other.S[:, None] @ other.V.mT)
    ranks = ranks_of_each(each)
    assert ranks.tolist() == [list(widths), [1, *widths[1:]]]
    counts = torch.tensor([[1, 2, 1], [0, 1, 3]])
    for most in (None, 2):
        expected = Triples.cat([task.leading(counts[:, index], most) for index, task in enumerate(each)])
        found = leading_of_each(each, counts, most)
        for part in ("U", "S", "V"):
            assert torch.equal(getattr(found, part), getattr(expected, part))
    doubled = triples_of_each(tasks, change=lambda task: Triples(task.U, 2 * task.S, task.V))
    assert all(torch.equal(two.S, 2 * one.S) for one, two in zip(each, doubled, strict=True))


def test_two_polar_factors_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU makes them, of one shape or of two."""
    matrix, expected = with_singular_values(torch.linspace(1, 0.1, 6, dtype=torch.float64), 9)
    other, of_other = with_singular_values(torch.linspace(2, 0.5, 6, dtype=torch.float64), 12, count=3)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    for pair, wanted in (((matrix, -matrix), (expected, -expected)), ((other, matrix), (of_other, expected))):
        for found, polar_factor in zip(polar_of_each(*pair), wanted, strict=True):
            torch.testing.assert_close(found, polar_factor, rtol=0, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_polar_factors_are_the_same_on_a_gpu() -> None:
    full, _ = with_singular_values(torch.linspace(1, 1e-3, 24, dtype=torch.float64), 40, count=4)
    full[2] = with_singular_values(torch.tensor([*[1.0] * 20, 0, 0, 0, 0]).double(), 40, count=1)[0][0]
    for matrix in (full, full.mT):
        torch.testing.assert_close(polar(matrix.cuda()).cpu(), polar(matrix), rtol=0, atol=1e-9)
