# SPDX-License-Identifier: Apache-2.0
"""The descent of DO-Merging in a kernel and three products a step, against the same steps by torch alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from tests.kernels.running import checks_of, interpret, on_a_gpu, run_all
from vllm_merge.adapters.stacking import ModuleGroup
from vllm_merge.methods.do_orthogonalize import _Pairs

STEPS = {"cpu": 6, "cuda": 100}


def pairs_of(ranks: Sequence[int], power: int, gamma: float) -> _Pairs:
    ends = torch.tensor(ranks).cumsum(0).tolist()
    slots = tuple(slice(end - rank, end) for end, rank in zip(ends, ranks, strict=True))
    group = ModuleGroup((99, 99), ("m",), (tuple(ranks),), slots)
    return _Pairs.of(group, torch.device("cpu"), power, gamma)


def grams_of(k: int, batch: int) -> Tensor:
    """Of random rows, the last of which in the first matrix is zero."""
    rows = torch.randn(batch, k, 2 * k, generator=torch.Generator().manual_seed(k), dtype=torch.float64) / k**0.5
    rows[0, -1] = 0
    return rows @ rows.mT


def check(ranks: Sequence[int], power: int, gamma: float, device: str, longer: float = 1.0) -> None:
    """longer: the first steps, so that they are taken back and halved."""
    from vllm_merge.kernels import descent

    pairs, gram = pairs_of(ranks, power, gamma), grams_of(sum(ranks), 3)
    size = torch.tensor([0.02, 0.01, 0.03], dtype=torch.float64) * longer
    expected = pairs.stepped(gram, size, STEPS[device])
    found = descent.descended(
        gram.to(device), pairs.slots, size.to(device), STEPS[device], power=power, gamma=gamma
    ).cpu()
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-10)
    one = torch.eye(sum(ranks), dtype=torch.float64)
    assert ((found - one)[1:].abs().amax((1, 2)) > 1e-4).all()


def check_both_powers(device: str) -> None:
    """With gamma and without."""
    for power in (1, 2):
        for gamma in (0.0, 0.3):
            check((3, 3, 3), power, gamma, device)


def check_ranks_of_any_size(device: str) -> None:
    """Ranks that differ, an adapter that has no term, and one term alone."""
    for ranks in ((1, 5, 2), (4, 0, 3), (1, 1), (2, 3, 9, 2)):
        check(ranks, 2, 0.5, device)


def check_steps_are_taken_back(device: str) -> None:
    """Where the first ones are a hundred times too long; as if they had been halved at once."""
    for power in (1, 2):
        check((3, 2, 4), power, 0.3, device, longer=100.0)


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("check", checks_of(globals()))
def test_on_a_gpu(check: Callable[[str], None]) -> None:
    check("cuda")


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("rank", [4, 15, 16])
def test_of_many_rows_on_a_gpu(rank: int) -> None:
    check((rank,) * 8, 2, 1.0, "cuda")


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("rows", [1, 7, 128, 200])
def test_the_largest_eigenvalue_on_a_gpu(rows: int) -> None:
    """By squaring, of spectra with a gap and with none."""
    from vllm_merge.methods.do_orthogonalize import _largest_eigenvalue

    wide = torch.randn(4, rows, 2 * rows, generator=torch.Generator().manual_seed(rows), dtype=torch.float64)
    grams = wide @ wide.mT * torch.tensor([1e-12, 1.0, 1e12, 0.0], dtype=torch.float64)[:, None, None]
    grams = torch.cat([grams, torch.eye(rows, dtype=torch.float64)[None]])
    expected = torch.linalg.eigvalsh(grams)[:, -1]
    assert torch.allclose(_largest_eigenvalue(grams.cuda()).cpu(), expected, rtol=1e-7, atol=0)


def test_in_tritons_interpreter() -> None:
    interpret("tests.kernels.test_descent", globals())


if __name__ == "__main__":
    run_all(globals())
