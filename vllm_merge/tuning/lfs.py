# SPDX-License-Identifier: Apache-2.0
"""Layer-wise fusion search (LFS, Su & Geiping, arXiv:2502.04030): rules and their parameters, by a growing number of prompts.

A step is as many candidates as all prompts together can be looked at once for: one that is scored on all of them, or several
that are given up early. So equal steps are equal budgets, whatever searches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from vllm_merge.errors import MergeError
from vllm_merge.tuning.blocks import Merger
from vllm_merge.tuning.layerwise import Space
from vllm_merge.tuning.learner import Learned
from vllm_merge.tuning.model import TuningModel
from vllm_merge.tuning.objective import Goal
from vllm_merge.tuning.samples import Samples, sizes_of
from vllm_merge.tuning.start import Start
from vllm_merge.tuning.study import SamplerName, Study, Values

FRONT_SHOWN = 20


class LayerwiseSearch:
    """Several goals are several objectives; their value is the mean of them, each as a share of what it is at the start."""

    steps: int | None = None
    checks = 1_000_000  # the value of the best is known at every step

    def __init__(
        self,
        model: TuningModel,
        start: Start,
        space: Space,
        goals: Mapping[str, Goal],
        *,
        sampler: SamplerName,
        seed: int,
    ) -> None:
        self._model, self._start, self._space, self._names = model, start, space, tuple(goals)
        self._merger = Merger(start)
        self._sizes = sizes_of(max(term.data.most for goal in goals.values() for term in goal.terms))
        self._samples = [Samples(goal, self._sizes, seed) for goal in goals.values()]
        self._rows = [sum(rows) for rows in zip(*(samples.rows for samples in self._samples), strict=True)]
        self._study = Study(space.draw, space.first, self._sizes, len(goals), sampler, seed)
        self._at_start: list[float] | None = None
        self._best: Values | None = None
        self._best_value = math.nan
        self._spent = 0
        self.done = 0

    def step(self) -> float:
        values = []
        while self._spent < (self.done + 1) * sum(self._rows):
            made, found, whole = self._study.candidate(self._scored)
            if found is None:
                continue
            values.append(self._one(found))
            if whole and values[-1] < self.value():
                self._best, self._best_value = made, values[-1]
        self.done += 1
        return min(values, default=self.value())

    def _scored(self, values: Values, enough: Callable[[float, int], bool]) -> Sequence[float] | None:
        """The objectives, at size after size until it is enough; each prompt that is looked at is counted."""
        try:
            branches = self._merger.branches(self._space.blocks(values))
        except MergeError:  # weights that a method refuses, or a result that is not finite
            self._spent += self._rows[0]
            return None
        found: list[float] = []
        with self._model.attached(branches):
            for size, rows, found in self._growing():
                self._spent += rows
                if not all(map(math.isfinite, found)):
                    return None
                if enough(found[0], size):
                    break
        return found

    def _growing(self) -> Iterator[tuple[int, int, list[float]]]:
        """Each size, how many prompts it adds, and the objectives there, of the model as it is attached now."""
        values = zip(*(samples.values(self._model) for samples in self._samples), strict=True)
        for size, rows, found in zip(self._sizes, self._rows, values, strict=True):
            yield size, rows, list(found)

    def _one(self, found: Sequence[float]) -> float:
        if len(found) == 1:
            return found[0]
        assert self._at_start is not None
        return sum(value / (at or 1.0) for value, at in zip(found, self._at_start, strict=True)) / len(found)

    def value(self) -> float:
        if self._at_start is None:
            with self._model.attached(self._start.branches(self._start.weights())):
                *_, (_, _, self._at_start) = self._growing()
        return self._one(self._at_start) if self._best is None else self._best_value

    def learned(self) -> Learned:
        return Learned() if self._best is None else Learned(blocks=self._space.blocks(self._best))

    def notes(self) -> list[str]:
        complete = self._study.complete
        lines = [
            f"{self._study.made} candidates, {len(complete)} of them on all {sum(self._rows)} prompts; "
            f"{self._spent} prompts were looked at"
        ]
        if self._best is not None:
            lines += self._space.words(self._best)
        if len(self._names) > 1:
            lines += self._front(complete)
        return lines

    def _front(self, complete: Sequence[tuple[int, Values, Sequence[float]]]) -> list[str]:
        """The Pareto front in words: the start and the candidates that no other is better than in everything."""
        assert self._at_start is not None
        points = {"the start": self._at_start} | {f"candidate {number + 1}": found for number, _, found in complete}
        front = {name: found for name, found in points.items() if not any(_beats(o, found) for o in points.values())}
        lines = [f"Pareto front, by mean share of the start ({len(front)} of {len(points)}):"]
        for name in sorted(front, key=lambda one: self._one(front[one]))[:FRONT_SHOWN]:
            values = (f"{title} {value:.4g}" for title, value in zip(self._names, front[name], strict=True))
            lines.append(f"{name}: {', '.join(values)}")
        return [*lines, f"… and {len(front) - FRONT_SHOWN} more"] if len(front) > FRONT_SHOWN else lines

    def state(self) -> dict[str, Tensor]:
        start = torch.tensor(self._at_start or [], dtype=torch.float64)
        return {"study": self._study.record(), "start": start, "spent": torch.tensor(self._spent)}

    def load(self, state: Mapping[str, Tensor], done: int) -> None:
        self._study.load(state["study"])
        self._at_start = state["start"].tolist()
        self._spent = int(state["spent"])
        for _, values, found in self._study.complete:
            if (value := self._one(found)) < self.value():
                self._best, self._best_value = values, value
        self.done = done


def _beats(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether one is as good everywhere and better somewhere."""
    return all(a <= b for a, b in zip(one, other, strict=True)) and tuple(one) != tuple(other)
