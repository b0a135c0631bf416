# SPDX-License-Identifier: Apache-2.0
"""Weights by gradient descent: AdaMerging (arXiv:2310.02575), and NSC (arXiv:2603.26317) with its objective.

The base model and all adapters are frozen; gradients reach the weights alone, one for each group of modules and adapter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from vllm_merge.tuning.branches import Composition
from vllm_merge.tuning.learner import Learned
from vllm_merge.tuning.model import TuningModel
from vllm_merge.tuning.objective import Goal
from vllm_merge.tuning.weights import Groups, rounded

LOWEST, HIGHEST = 0.0, 3.0
"""What weights are kept within. AdaMerging's code has 1.0 for the highest; adapters that others drown need more."""
BETAS = (0.9, 0.999)


class GradientLearner:
    """Adam on the weights (groups, n), kept between LOWEST and HIGHEST."""

    steps: int | None = None
    checks = 10

    def __init__(
        self,
        model: TuningModel,
        composition: Composition,
        goal: Goal,
        groups: Groups,
        start: Tensor,
        *,
        rate: float,
        of_each: int,
        seed: int,
    ) -> None:
        """start: weights (modules, n); a group begins with their mean. of_each: prompts of each task in a step."""
        self._model, self._composition, self._goal, self._groups = model, composition, goal, groups
        self._of_each, self._seed = of_each, seed
        self._start = start
        self.weights = groups.mean(start.double()).float().to(model.device).requires_grad_()
        self._adam = torch.optim.Adam([self.weights], lr=rate, betas=BETAS)
        self.done = 0

    def step(self) -> float:
        self._adam.zero_grad()
        with self._model.attached(self._composition.branches(self._groups.spread(self.weights))):
            loss = self._goal.backward(self._model, self._of_each, self._seed, self.done)
        gradient = self.weights.grad
        if not math.isfinite(loss) or gradient is None or not bool(gradient.isfinite().all()):
            return math.nan
        self._adam.step()
        with torch.no_grad():
            self.weights.clamp_(LOWEST, HIGHEST)
        self.done += 1
        return loss

    def _table(self) -> Tensor:
        """(modules, n) float64, as a recipe writes it; before the first step the recipe's own."""
        return rounded(self._groups.spread(self.weights) if self.done else self._start)

    def value(self) -> float:
        table = self._table().to(self.weights)
        with torch.no_grad(), self._model.attached(self._composition.branches(table)):
            return self._goal.value(self._model)

    def learned(self) -> Learned:
        return Learned(weights=self._table())

    def notes(self) -> list[str]:
        return []

    def state(self) -> dict[str, Tensor]:
        moments = self._adam.state.get(self.weights, {})
        kept = {name: value for name, value in moments.items() if isinstance(value, Tensor)}
        return {"weights": self.weights.detach(), **{f"adam.{name}": value for name, value in kept.items()}}

    def load(self, state: Mapping[str, Tensor], done: int) -> None:
        with torch.no_grad():
            self.weights.copy_(state["weights"])
        moments = {name.removeprefix("adam."): value for name, value in state.items() if name.startswith("adam.")}
        for name in ("exp_avg", "exp_avg_sq"):
            if name in moments:
                moments[name] = moments[name].to(self.weights.device)
        self._adam.state[self.weights] = moments
        self.done = done
