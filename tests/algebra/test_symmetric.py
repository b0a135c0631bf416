# SPDX-License-Identifier: Apache-2.0
"""Batches of small eigendecompositions: right, in order, and the same however many threads there are."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from vllm_merge.algebra import symmetric
from vllm_merge.algebra.symmetric import descending_eigh, inverse_cholesky, looked_at_once


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def grams(batch: int, k: int, rank: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(batch * k)
    rows = torch.randn(batch, k, rank, generator=generator, dtype=torch.float64)
    return (rows @ rows.mT).to(dtype)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("batch", "k", "rank"), [(1, 5, 5), (3, 80, 80), (7, 33, 10), (2, 1, 1), (5, 12, 1)])
def test_largest_first_and_never_negative(threads: int, batch: int, k: int, rank: int) -> None:
    torch.set_num_threads(threads)
    matrices = grams(batch, k, rank)
    values, vectors = descending_eigh(matrices)
    assert (values >= 0).all()
    assert (values.diff(dim=-1) <= 0).all()
    size = values[:, :1, None]
    assert ((vectors @ torch.diag_embed(values) @ vectors.mT - matrices).abs() < 1e-12 * size).all()
    assert (vectors.mT @ vectors - torch.eye(k, dtype=torch.float64)).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("batch", "k"), [(2, 80), (3, 16), (9, 32), (9, 33), (40, 4)])
def test_a_batch_gives_the_same_bytes_with_any_number_of_threads(batch: int, k: int, dtype: torch.dtype) -> None:
    matrices = grams(batch, k, 2 * k, dtype)
    torch.set_num_threads(1)
    values, vectors = descending_eigh(matrices)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        again = descending_eigh(matrices)
        assert torch.equal(again[0], values)
        assert torch.equal(again[1], vectors)
        assert torch.get_num_threads() == threads, "the caller's threads are left as they are"


def test_several_threads_may_ask_at_once() -> None:
    torch.set_num_threads(2)
    matrices = grams(6, 40, 40)
    expected = descending_eigh(matrices)
    found: list[tuple[Tensor, Tensor]] = []
    callers = [threading.Thread(target=lambda: found.append(descending_eigh(matrices))) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(found) == 4
    assert all(torch.equal(a, b) for pair in found for a, b in zip(pair, expected, strict=True))


def test_the_inverse_of_a_factor_or_nothing() -> None:
    regular = grams(3, 10, 40)
    inverse = inverse_cholesky(regular)
    assert inverse is not None
    assert (inverse @ regular @ inverse.mT - torch.eye(10, dtype=torch.float64)).abs().max() < 1e-10
    singular = torch.cat([regular, grams(1, 10, 3)])
    assert inverse_cholesky(singular) is None
    assert inverse_cholesky(-regular) is None


class PlayedKernels:
    """Stands for `kernels.tridiagonal`: decompositions of which the first ones are wrong, and said to be."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, wrong: int) -> None:
        self.wrong, self.calls = wrong, 0
        monkeypatch.setattr("vllm_merge.kernels.tridiagonal", SimpleNamespace(eigh=self.eigh), raising=False)
        monkeypatch.setattr(symmetric, "descending_eigh", symmetric._at_once)

    def eigh(self, matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        values, vectors = (part.flip(-1) for part in torch.linalg.eigh(matrices.nan_to_num()))
        right = matrices.isfinite().all(-1).all(-1).to(torch.int8)
        self.calls += 1
        if self.calls <= self.wrong:
            values[1], vectors[1], right[1] = torch.nan, torch.nan, 0
        return values, vectors, right


@pytest.mark.parametrize(("wrong", "calls"), [(0, 2), (1, 4), (2, 4), (3, 4), (4, 5)])
def test_a_look_at_the_end_finds_what_a_look_after_each_would(monkeypatch, wrong: int, calls: int) -> None:
    """Two decompositions in a row, in a computation that is itself part of one."""
    kernels = PlayedKernels(monkeypatch, wrong)
    matrices = grams(3, 10, 10)

    def compute() -> tuple[Tensor, Tensor]:
        _, vectors = symmetric.descending_eigh(matrices)
        return looked_at_once(lambda: symmetric.descending_eigh(vectors.mT @ matrices @ vectors))

    values, vectors = looked_at_once(compute)
    assert kernels.calls == calls
    assert (values - torch.linalg.eigvalsh(matrices).flip(-1)).abs().max() < 1e-10
    assert vectors.isfinite().all()


def test_without_it_each_is_looked_at(monkeypatch) -> None:
    kernels = PlayedKernels(monkeypatch, wrong=1)
    with pytest.raises(ZeroDivisionError):
        looked_at_once(lambda: 1 // 0)
    matrices = grams(3, 10, 10)
    values, vectors = symmetric.descending_eigh(matrices)
    assert kernels.calls == 1
    assert ((vectors @ torch.diag_embed(values) @ vectors.mT - matrices).abs() < 1e-10).all()
