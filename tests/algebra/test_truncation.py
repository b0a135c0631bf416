# SPDX-License-Identifier: Apache-2.0
"""Truncation: Eckart–Young from the Gram matrix, near it from the sketch, and honest energies."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vllm_merge import UserInputError
from vllm_merge.algebra import truncation
from vllm_merge.algebra.ranks import RankPolicy
from vllm_merge.algebra.truncation import Batch, Truncated, truncate, truncate_each


def matrices(short: int = 48, decay: float = 0.9) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    u = torch.linalg.qr(torch.randn(2, 96, short, generator=generator, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(2, short, short, generator=generator, dtype=torch.float64)).Q
    return ((u * decay ** torch.arange(short)) @ v.mT).float()


def cut(x: Tensor, policy: RankPolicy, strip: int = 40) -> Truncated:
    sums = torch.full((x.shape[0],), 8)
    return truncate(lambda: iter(x.split(strip, dim=1)), x.shape[2], policy, sums, seed=0)


def best_error(x: Tensor, rank: int) -> Tensor:
    return torch.linalg.svdvals(x.double())[:, rank:].square().sum(-1).sqrt()


def error(x: Tensor, result: Truncated) -> Tensor:
    return torch.linalg.matrix_norm(x.double() - result.long.double() @ result.short.double().mT)


@pytest.mark.parametrize(("exact_limit", "gram_limit", "slack"), [(128, 1024, 1.0001), (8, 1024, 1.0001), (8, 8, 1.01)])
def test_best_approximation(monkeypatch: pytest.MonkeyPatch, exact_limit: int, gram_limit: int, slack: float) -> None:
    monkeypatch.setattr(truncation, "EXACT_LIMIT", exact_limit)
    monkeypatch.setattr(truncation, "GRAM_LIMIT", gram_limit)
    monkeypatch.setattr(truncation, "OVERSAMPLING", 8)
    x = matrices(decay=0.8)
    result = cut(x, RankPolicy(6))
    assert result.ranks.tolist() == [6, 6]
    assert not result.exact.any()
    assert torch.all(error(x, result) <= slack * best_error(x, 6))
    kept = (result.long.double() @ result.short.double().mT).square().sum((-1, -2)) / x.double().square().sum((-1, -2))
    assert torch.allclose(result.energy, kept, atol=1e-6)


@pytest.mark.parametrize("rank", [8, 16, 32, 64])
def test_a_flat_spectrum_keeps_99_percent_of_what_is_best(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    """Eight adapters of rank 16, trimmed to a fifth of their entries: 128 singular values that hardly fall, then a long tail."""
    monkeypatch.setattr(truncation, "GRAM_LIMIT", 128)  # what reads strips needs no matrix of thousands then
    generator = torch.Generator().manual_seed(1)
    x = torch.zeros(640, 600)
    for _ in range(8):
        delta = torch.randn(640, 16, generator=generator) @ torch.randn(16, 600, generator=generator)
        x += delta * (delta.abs() >= delta.abs().flatten().kthvalue(int(0.8 * delta.numel())).values)
    best = torch.linalg.svdvals(x.double())[:rank].square().sum()
    result = cut(x[None], RankPolicy(rank), strip=320)
    lost = error(x[None], result)[0].square()
    assert (x.double().square().sum() - lost) / best >= 0.99


def test_factors_are_balanced() -> None:
    result = cut(matrices(), RankPolicy(5))
    assert torch.allclose(result.long.double().norm(dim=1), result.short.double().norm(dim=1), rtol=1e-5)


def test_lossless_keeps_the_numerical_rank() -> None:
    x = matrices(decay=0.5)  # 0.5^20 < 1e-6 < 0.5^19
    result = cut(x, RankPolicy.parse("lossless", None))
    assert result.ranks.tolist() == [20, 20]
    assert result.exact.all()
    assert torch.all(error(x, result) < 3e-6)


def test_energy_keeps_the_smallest_rank_that_is_enough() -> None:
    x = matrices()
    result = cut(x, RankPolicy.parse({"energy": 0.9}, None))
    rank = result.ranks[0].item()
    energies = torch.linalg.svdvals(x[0].double()).square().cumsum(0) / x[0].double().square().sum()
    assert energies[rank - 1] >= 0.9 > energies[rank - 2]
    assert cut(x, RankPolicy.parse({"energy": 0.9}, 3)).ranks.tolist() == [3, 3]


def test_auto_is_the_sum_of_ranks_or_the_given_maximum() -> None:
    assert cut(matrices(), RankPolicy.parse("auto", None)).ranks.tolist() == [8, 8]
    assert cut(matrices(), RankPolicy.parse("auto", 4)).ranks.tolist() == [4, 4]
    assert cut(matrices(), RankPolicy.parse(16, 4)).ranks.tolist() == [4, 4]


@pytest.mark.parametrize("rank", [0, -1, True, "all", {"energy": 0}, {"energy": 1.1}, {"share": 0.5}, 1.5])
def test_wrong_ranks(rank: object) -> None:
    with pytest.raises(UserInputError, match="allowed are 'auto', 'lossless', an integer"):
        RankPolicy.parse(rank, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("rank", ["lossless", 3, {"energy": 0.9}])
def test_batches_that_are_cut_at_once_are_cut_as_each_alone(rank: int | str | dict[str, float]) -> None:
    """Batches of different lengths and ranks, one without any direction; each as wide as its own largest rank."""
    policy, x = RankPolicy.parse(rank, None), matrices()
    given = [x, x[:1, :20] * 3, torch.zeros_like(x[:1])]
    batches = [Batch(lambda x=x: iter(x.split(7, dim=1)), torch.full((len(x),), 8)) for x in given]
    together = list(truncate_each(batches, x.shape[2], policy, seed=0))
    for mine, found in zip(given, together, strict=True):
        alone = cut(mine, policy)
        assert torch.equal(found.ranks, alone.ranks)
        assert torch.equal(found.exact, alone.exact)
        assert found.long.shape == alone.long.shape
        torch.testing.assert_close(found.long @ found.short.mT.float(), alone.long @ alone.short.mT.float())
    assert together[-1].ranks.tolist() == [0]


def test_what_is_not_cut_needs_no_spectrum() -> None:
    """Nor where columns are zero; but where they are dependent."""
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(5, 40, 12, generator=generator)
    x[1, :, [0, 5, 11]] = 0
    x[2] = 0
    x[3, :, 3] *= 1e-2
    x[4, :, 7] = x[4, :, 6]
    policy = RankPolicy(None)

    def batch(some: Tensor) -> Batch:
        return Batch(lambda: iter([some[:, :24], some[:, 24:]]), torch.full((len(some),), 12))

    grams = [x[part].double().mT @ x[part].double() for part in (slice(4), slice(3, 5))]
    transform, nothing = truncation._uncut([batch(x[:4]), batch(x[3:])], grams, policy)
    assert nothing is None
    assert transform is not None
    found, expected = (
        truncation._turned(batch(x[:4]).strips, grams[0], transform),
        truncate(batch(x[:4]).strips, 12, policy, torch.full((4,), 12), 0),
    )
    assert found.ranks.tolist() == expected.ranks.tolist() == [12, 9, 0, 12]
    torch.testing.assert_close(found.long.double() @ found.short.mT, x[:4].double(), rtol=0, atol=1e-6)
    for name in ("norm", "energy", "exact"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-12, atol=0)
    for side in (found.long, found.short):
        beyond = torch.arange(12) >= found.ranks[:, None]
        assert torch.equal((side == 0).all(1), beyond)
    torch.testing.assert_close(found.long.double().norm(dim=(1, 2)), found.short.norm(dim=(1, 2)), rtol=1e-5, atol=0)
