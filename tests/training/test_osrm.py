# SPDX-License-Identifier: Apache-2.0
"""The OSRM initialisation: the recorded cases of its code, what it minimises, and the lossy variant for trained adapters."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests import golden
from vllm_merge import LoraFactors, MergeError, UserInputError
from vllm_merge.training.osrm import Moments, osrm_init, projected

ENTRIES = {entry["method"]: entry for entry in golden.entries() if entry["method"].startswith("osrm")}


def moments(rows: Tensor, pieces: int = 1) -> Moments:
    found = Moments.zero(rows.shape[1], rows.device)
    for piece in rows.chunk(pieces):
        found.add(piece)
    return found


def recorded(entry: golden.Entry) -> dict[str, tuple[dict[str, Moments], Tensor, Tensor]]:
    """Of each module: moments by task, all inputs, and the expected projector AᵀA."""
    tensors = load_file(golden.FOLDER / entry["file"])
    found = {}
    for module in entry["modules"]:
        rows = {str(i): tensors[f"in.{i}.{module}.features"] for i in range(entry["n_adapters"])}
        by_task = {task: moments(mine) for task, mine in rows.items()}
        found[module] = by_task, torch.cat(list(rows.values())), tensors[f"out.{module}"]
    return found


def test_recorded_case() -> None:
    entry = ENTRIES["osrm_init"]
    for by_task, _, expected in recorded(entry).values():
        a = osrm_init(by_task, entry["params"]["rank"])
        assert float((a.mT @ a - expected).norm() / expected.norm()) <= entry["tolerance"]
        without = osrm_init({task: by_task[task] for task in ("0", "1")}, entry["params"]["rank"])
        assert float((without.mT @ without - expected).norm() / expected.norm()) > 0.1


@pytest.mark.parametrize("seed", [0, 1])
def test_recorded_case_of_means(seed: int) -> None:
    """Any basis of what the means leave is right: at right angles to them, and orthonormal."""
    entry = ENTRIES["osrm_init_mean_illdefined"]
    for by_task, rows, _ in recorded(entry).values():
        a = osrm_init(by_task, entry["params"]["rank"], "mean", seed=seed)
        assert float((a @ rows.mT).abs().max()) < 1e-5 * float(rows.abs().max())
        assert torch.allclose(a @ a.mT, torch.eye(len(a)), atol=1e-6)


def test_it_minimises() -> None:
    """‖A Hᵀ‖² / (k − 1) is the sum of the smallest eigenvalues; own energy and random directions are above."""
    rows = torch.randn(200, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = rows * torch.logspace(0, 2, 24, dtype=torch.float64)
    found = moments(rows, pieces=7)
    assert found.count == 200
    a = osrm_init({"other": found}, 5)
    values = torch.linalg.eigvalsh(rows.mT @ rows / 199)
    assert float((a.double() @ rows.mT).square().sum() / 199) == pytest.approx(float(values[:5].sum()), rel=1e-4)
    random, _ = torch.linalg.qr(torch.randn(24, 5, generator=torch.Generator().manual_seed(1)))
    assert found.seen_by(a) < 0.01 < found.seen_by(random.mT.contiguous())


def test_of_many_unused_directions_the_seed_picks() -> None:
    rows = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    others = {"other": moments(rows)}
    one, again, two = osrm_init(others, 4), osrm_init(others, 4), osrm_init(others, 4, seed=1)
    assert torch.equal(one, again)
    assert float((one @ two.mT).norm()) < 1.9  # 2 were they the same space
    for a in (one, two):
        assert float((a @ rows.mT).abs().max()) < 1e-5
        assert torch.allclose(a @ a.mT, torch.eye(4), atol=1e-6)


def test_a_rank_that_the_means_leave_no_room_for() -> None:
    rows = torch.eye(4)[:2]
    others = {str(index): moments(row[None]) for index, row in enumerate(rows)}
    a = osrm_init(others, 3, "mean")
    assert torch.allclose(a @ a.mT, torch.eye(3), atol=1e-6)
    assert float((a @ rows.mT).square().sum()) == pytest.approx(1.0, abs=1e-5)  # one of the two must be seen


def test_refusals() -> None:
    found = moments(torch.ones(2, 4))
    with pytest.raises(UserInputError, match="samples of at least one other task"):
        osrm_init({}, 2)
    with pytest.raises(UserInputError, match="rank 5 is above the 4 inputs"):
        osrm_init({"other": found}, 5)
    found.add(torch.full((1, 4), float("nan")))
    with pytest.raises(MergeError, match="not finite"):
        osrm_init({"other": found}, 2)


def test_after_training_it_keeps_what_lies_on_the_directions() -> None:
    generator = torch.Generator().manual_seed(0)
    pair = LoraFactors(torch.randn(3, 8, generator=generator), torch.randn(6, 3, generator=generator), 2.0)
    directions, _ = torch.linalg.qr(torch.randn(8, 8, generator=generator))
    whole, kept = projected(pair, directions)
    assert kept == pytest.approx(1.0)
    assert torch.allclose(whole.delta(), pair.delta(), atol=1e-5)
    part, kept = projected(pair, directions[:4])
    expected = pair.delta() @ directions[:4].mT @ directions[:4]
    assert torch.allclose(part.delta(), expected, atol=1e-5)
    assert kept == pytest.approx(float(expected.square().sum() / pair.delta().square().sum()), rel=1e-5)
    assert kept < 0.95
