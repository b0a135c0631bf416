# SPDX-License-Identifier: Apache-2.0
"""Weights without gradients, by CMA-ES: ENMP's mask of modules (arXiv:2604.17753), and LoraHub's weights (arXiv:2307.13269).

They merge anew for every candidate, so that any merge method with weights will do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vllm_merge.errors import MergeError, UserInputError
from vllm_merge.tuning.learner import Learned
from vllm_merge.tuning.weights import Groups, rounded

Evaluate = Callable[[Tensor], float]
"""The goal's value for weights (modules, n)."""
WORST = 1e9  # for candidates without a finite value, which CMA-ES cannot take

MASK_POPULATION, MASK_SIGMA, MASK_MEAN = 16, 0.5, -1.0
MOST_PRUNED = 0.2  # of the pairs of group and adapter
BOUND, WEIGHT_SIGMA, PENALTY = 1.5, 0.5, 0.05  # LoraHub: |w| at most, and what mean |w| costs


class Search:
    """CMA-ES over vectors that `decode` makes weights of. A step is a generation; what is learned is the best so far."""

    steps: int | None = None
    checks = 1_000_000  # the value of the best is known at every step

    def __init__(
        self,
        evaluate: Evaluate,
        decode: Callable[[Tensor], Tensor],
        penalty: Callable[[Tensor], float],
        start: Tensor,
        *,
        mean: Tensor,
        sigma: float,
        bound: float | None,
        population: int | None,
        seed: int,
    ) -> None:
        """start: weights (modules, n), the first best. mean: (dimensions,) float64. bound: of every entry's magnitude."""
        self._evaluate, self._decode, self._penalty = evaluate, decode, penalty
        bounds = None if bound is None else np.array([[-bound, bound]] * len(mean))
        self._cma = _cma(mean.numpy(), sigma, bounds, population, seed)
        self._told: list[Tensor] = []  # of every generation, the values: asked again, CMA-ES gives the same candidates
        self._best, self._best_value = rounded(start), math.nan
        self.done = 0

    def step(self) -> float:
        candidates = [torch.from_numpy(self._cma.ask()) for _ in range(self._cma.population_size)]
        values = []
        for candidate in candidates:
            table = rounded(self._decode(candidate))
            value = self._value(table) + self._penalty(table)
            if value < self._best_value or math.isnan(self._best_value):
                self._best, self._best_value = table, value
            values.append(value if math.isfinite(value) else WORST)
        self._tell(candidates, torch.tensor(values, dtype=torch.float64))
        self.done += 1
        return min(values) if min(values) < WORST else math.nan

    def _tell(self, candidates: list[Tensor], values: Tensor) -> None:
        self._cma.tell([(one.numpy(), float(value)) for one, value in zip(candidates, values, strict=True)])
        self._told.append(values)

    def _value(self, table: Tensor) -> float:
        try:
            return self._evaluate(table)
        except (
            MergeError
        ):  # weights that the method refuses, such as those that add up to 0, or a result that is not finite
            return math.inf

    def value(self) -> float:
        if math.isnan(self._best_value):
            self._best_value = self._evaluate(self._best) + self._penalty(self._best)
        return self._best_value

    def learned(self) -> Learned:
        return Learned(weights=self._best)

    def notes(self) -> list[str]:
        return []

    def state(self) -> dict[str, Tensor]:
        told = torch.stack(self._told) if self._told else torch.empty(0, 0, dtype=torch.float64)
        value = torch.tensor([self._best_value], dtype=torch.float64)
        return {"told": told, "best_weights": self._best, "best_value": value}

    def load(self, state: Mapping[str, Tensor], done: int) -> None:
        for values in state["told"]:
            self._tell([torch.from_numpy(self._cma.ask()) for _ in values], values)
        self._best, self._best_value = state["best_weights"], float(state["best_value"])
        self.done = done


def enmp(evaluate: Evaluate, groups: Groups, start: Tensor, present: Tensor, seed: int) -> Search:
    """Which pairs of group and adapter are left out: those of the largest positive score, at most MOST_PRUNED of all.

    start: weights (modules, n). present: (modules, n) bool, where an adapter has the module; only such pairs count.
    """
    pairs = (groups.mean(present.double()) > 0).nonzero()
    most = int(MOST_PRUNED * len(pairs))
    if most == 0:
        raise UserInputError(
            f"there are {len(pairs)} pairs of a group and an adapter, too few to leave any out; choose a finer --per"
        )

    def decode(candidate: Tensor) -> Tensor:
        scores, order = candidate.sort(descending=True, stable=True)
        pruned = pairs[order[:most][scores[:most] > 0]]
        mask = torch.ones(len(groups.names), start.shape[1], dtype=torch.float64)
        mask[pruned[:, 0], pruned[:, 1]] = 0
        return start * groups.spread(mask)

    mean = torch.full((len(pairs),), MASK_MEAN, dtype=torch.float64)
    return Search(
        evaluate,
        decode,
        lambda table: 0.0,
        start,
        mean=mean,
        sigma=MASK_SIGMA,
        bound=None,
        population=MASK_POPULATION,
        seed=seed,
    )


def lorahub(evaluate: Evaluate, groups: Groups, start: Tensor, seed: int) -> Search:
    """Weights between −BOUND and BOUND, from 0 as published, with PENALTY · mean |w| added to the goal. start: as in `enmp`."""
    shape = (len(groups.names), start.shape[1])
    return Search(
        evaluate,
        lambda candidate: groups.spread(candidate.view(shape)),
        lambda table: PENALTY * float(table.abs().mean()),
        start,
        mean=torch.zeros(shape[0] * shape[1], dtype=torch.float64),
        sigma=WEIGHT_SIGMA,
        bound=BOUND,
        population=None,
        seed=seed,
    )


def _cma(mean: Any, sigma: float, bounds: Any, population: int | None, seed: int) -> Any:
    try:
        from cmaes import CMA
    except ImportError:
        raise MergeError(
            "cmaes is not installed, which searches without gradients; install it with `pip install 'vllm-merge[tune]'`"
        ) from None
    return CMA(mean=mean, sigma=sigma, bounds=bounds, seed=seed, population_size=population)
