# SPDX-License-Identifier: Apache-2.0
"""Batches of small eigendecompositions: right, in order, and the same however many threads there are."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from vllm_merge.algebra.symmetric import descending_eigh, inverse_cholesky


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
