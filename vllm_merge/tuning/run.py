# SPDX-License-Identifier: Apache-2.0
"""Runs a learner: step by step, with its progress kept in a file, until its steps are made, it is stopped, or it fails."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from vllm_merge.errors import MergeError
from vllm_merge.tuning.learner import Learned, Learner
from vllm_merge.tuning.state import Progress, load_state, save_state

SAVE_SECONDS = 5.0


@dataclass(frozen=True)
class Ended:
    """How a run ended. learned: the best of it. failure: why it could not go on, empty where it did not fail."""

    learned: Learned
    progress: Progress
    stopped: bool
    failure: str


class Run:
    """One run of a learner in a folder. identity: what a resumed run must have in common with it."""

    def __init__(self, learner: Learner, folder: Path, identity: Mapping[str, Any], steps: int) -> None:
        self._learner, self._folder, self._identity = learner, folder, identity
        self.steps = steps if learner.steps is None else min(steps, learner.steps)
        self.progress = Progress()
        self._best: Learned | None = None

    def resume(self) -> None:
        """Go on where the state in the folder ends. Raises UserInputError."""
        self.progress, state, best = load_state(self._folder, self._identity)
        self._learner.load(state, self.progress.done)
        self._best = Learned(weights=best) if best is not None else None

    def go(self, notify: Callable[[int, int, float | None], None], stopped: Callable[[], bool]) -> Ended:
        """Make the steps that are left. notify(step, steps, best value); stopped(): whether to end after this step.

        Raises MergeError where not even the start has a value.
        """
        began, saved = time.perf_counter() - self.progress.seconds, time.perf_counter()
        every = max(1, self.steps // self._learner.checks)
        failure = ""
        if self.progress.start is None:
            notify(0, self.steps, None)
            self.progress.start = self._checked(0, "before the first step")
        elif self._best is None:  # of what is no weights, the state has what it is worked out from
            known, self.progress.best = (self.progress.best, self.progress.best_step), None
            if self._checked(self.progress.done, "where it went on") == known[0]:
                self.progress.best_step = known[1]
        while self.progress.done < self.steps and not stopped() and not failure:
            loss = self._learner.step()
            step = self._learner.done
            if math.isnan(loss):
                failure = f"the loss is not a number at step {self.progress.done + 1} of {self.steps}"
                break
            value = None
            if step % every == 0 or step == self.steps or stopped():
                try:
                    value = self._checked(step, f"after step {step}")
                except MergeError as error:
                    failure = str(error)
            self.progress.done = step
            self.progress.history.append((step, loss, value))
            self.progress.seconds = time.perf_counter() - began
            notify(step, self.steps, self.progress.best)
            if not failure and time.perf_counter() - saved > SAVE_SECONDS:
                self._save()
                saved = time.perf_counter()
        self.progress.seconds = time.perf_counter() - began
        if not failure:
            self._save()
        assert self._best is not None
        return Ended(self._best, self.progress, self.progress.done < self.steps and not failure, failure)

    def _checked(self, step: int, when: str) -> float:
        """The value of what is learned by now, which becomes the best if it is."""
        value = self._learner.value()
        if not math.isfinite(value):
            raise MergeError(
                f"the objective is {value} {when}; look at the weights of the recipe, the data, and --rate where gradients "
                "are taken"
            )
        if self.progress.best is None or value < self.progress.best:
            self.progress.best, self.progress.best_step, self._best = value, step, self._learner.learned()
        return value

    def _save(self) -> None:
        best: Tensor | None = self._best.weights if self._best is not None else None
        save_state(self._folder, self._identity, self.progress, self._learner.state(), best)
