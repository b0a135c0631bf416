# SPDX-License-Identifier: Apache-2.0
"""The loop around a learner: the best is kept, a stop and a failure keep it too, and a run goes on from its file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vllm_merge import MergeError, UserInputError
from vllm_merge.tuning.learner import Learned
from vllm_merge.tuning.run import Ended, Run
from vllm_merge.tuning.state import STATE_FILE


class Scripted:
    """Its values are those of a list, the first being the start's; its weights say at which step they are of."""

    steps: int | None = None
    checks = 1_000_000

    def __init__(self, values: list[float]) -> None:
        self.values, self.done = values, 0

    def step(self) -> float:
        if math.isnan(self.values[self.done + 1]):
            return math.nan
        self.done += 1
        return self.values[self.done]

    def value(self) -> float:
        return self.values[self.done]

    def learned(self) -> Learned:
        return Learned(weights=torch.tensor([[float(self.done)]], dtype=torch.float64))

    def notes(self) -> list[str]:
        return []

    def state(self) -> dict[str, Tensor]:
        return {"done": torch.tensor([self.done])}

    def load(self, state: Mapping[str, Tensor], done: int) -> None:
        assert int(state["done"]) == done
        self.done = done


IDENTITY = {"method": "scripted", "seed": 0}


def go(learner: Scripted, folder: Path, steps: int, *, stop_at: int = 10**9, resume: bool = False) -> Ended:
    run = Run(learner, folder, IDENTITY, steps)
    if resume:
        run.resume()
    return run.go(lambda done, total, best: None, lambda: learner.done >= stop_at)


def of_step(ended: Ended) -> int:
    assert ended.learned.weights is not None
    return int(ended.learned.weights)


def test_the_best_is_kept(tmp_path: Path) -> None:
    ended = go(Scripted([5.0, 3.0, 1.0, 2.0, 4.0]), tmp_path, 4)
    assert (of_step(ended), ended.progress.best_step, ended.progress.best, ended.progress.start) == (2, 2, 1.0, 5.0)
    assert not ended.stopped
    assert not ended.failure
    assert [step for step, _, _ in ended.progress.history] == [1, 2, 3, 4]


def test_no_step_is_better_than_the_start(tmp_path: Path) -> None:
    assert of_step(go(Scripted([1.0, 3.0, 2.0]), tmp_path, 2)) == 0


def test_a_stop_keeps_the_best_and_goes_on_later(tmp_path: Path) -> None:
    values = [5.0, 3.0, 4.0, 2.0, 6.0]
    ended = go(Scripted(values), tmp_path, 4, stop_at=2)
    assert (of_step(ended), ended.stopped, ended.progress.done) == (1, True, 2)
    resumed = go(Scripted(values), tmp_path, 4, resume=True)
    assert (of_step(resumed), resumed.stopped, resumed.progress.best) == (3, False, 2.0)
    assert [step for step, _, _ in resumed.progress.history] == [1, 2, 3, 4]
    again = go(Scripted(values), tmp_path, 4, resume=True)
    assert (of_step(again), again.progress.history) == (3, resumed.progress.history)


@pytest.mark.parametrize("where", ["loss", "value"])
def test_a_loss_that_is_no_number_keeps_the_best(where: str, tmp_path: Path) -> None:
    learner = Scripted([5.0, 3.0, math.nan if where == "loss" else math.inf, 1.0])
    ended = go(learner, tmp_path, 3)
    assert of_step(ended) == 1
    said = "the loss is not a number at step 2 of 3" if where == "loss" else "the objective is inf after step 2"
    assert said in ended.failure


def test_a_start_without_a_value_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(MergeError, match="the objective is nan before the first step"):
        go(Scripted([math.nan, 1.0]), tmp_path, 1)
    assert list(tmp_path.iterdir()) == []


def test_another_run_is_not_gone_on_with(tmp_path: Path) -> None:
    learner = Scripted([2.0, 1.0])
    with pytest.raises(UserInputError, match=f"has no {STATE_FILE}; leave the option out"):
        go(learner, tmp_path, 1, resume=True)
    go(learner, tmp_path, 1)
    with pytest.raises(UserInputError, match=r"is of another run .*seed: it was 0, now 1"):
        Run(learner, tmp_path, {**IDENTITY, "seed": 1}, 1).resume()
    (tmp_path / STATE_FILE).write_bytes(b"cut off")
    with pytest.raises(UserInputError, match="cannot be read"):
        go(learner, tmp_path, 1, resume=True)
