# SPDX-License-Identifier: Apache-2.0
"""SSR and RegMean from prompts: forward passes with one adapter at a time, then a closed form for every module.

With a safety set, its inputs enter as one more task, whose target is the adapter that its prompts' `task` names, or the base
model: Σ over the safety set + α Σ over the experts' (MergeAlign, arXiv:2406.14563), each a mean over its tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from vllm_merge.adapters.factors import Adapter, embeddings_of
from vllm_merge.tuning.batches import Batch, Encoded
from vllm_merge.tuning.branches import Sum
from vllm_merge.tuning.correction import corrected
from vllm_merge.tuning.learner import Learned
from vllm_merge.tuning.model import Branch, TuningModel
from vllm_merge.tuning.objective import Goal
from vllm_merge.tuning.statistics import Fit, Moments

SCALES = (0.63, 0.8, 1.0, 1.26, 1.6, 2.0, 2.5, 3.2, 4.0, 5.0)  # λ: a step is a quarter more


class Regression:
    """A step runs some prompts of every task, each with its task's adapter alone; all prompts once are all steps.

    Where tasks share inputs, the least squares lie between what their adapters do there, a mean of them: so the sum of the
    corrected adapters needs a λ above 1, which is looked for among SCALES by the goal.
    """

    checks = 1

    def __init__(
        self,
        model: TuningModel,
        adapters: Sequence[Adapter],
        modules: Sequence[str],
        sets: Sequence[tuple[float, Encoded]],
        goal: Goal,
        plain: Mapping[str, Branch],
        kind: type[Moments],
        *,
        of_each: int,
        seed: int,
    ) -> None:
        """sets: (weight, prompts); the first is the experts', whose tasks without an adapter's name are of all adapters.

        plain: the branches of the recipe as it is.
        """
        self._goal, self._plain = goal, plain
        self._model, self._adapters, self._kind = model, adapters, kind
        self._sum = Sum(adapters, modules, model.device)
        tokens = embeddings_of(adapters)  # an embedding's inputs are no vectors: its adapters stay as they are
        self._modules = [module for module in modules if module not in tokens]
        self._names = [adapter.name for adapter in adapters]
        self._weights = [weight for weight, _ in sets]
        self._passes = [data.passes(of_each, seed) for _, data in sets]
        self.steps = max(len(passes) for passes in self._passes)
        self._found = [self._empty() for _ in sets]
        self._learned = Learned()
        self.done = 0

    def _empty(self) -> dict[str, Moments]:
        terms = {module: self._sum.terms(module) for module in self._modules}
        return {module: self._kind.empty(mine.A, mine.B, mine.owner) for module, mine in terms.items()}

    @torch.no_grad()
    def step(self) -> float:
        for index, passes in enumerate(self._passes):
            for batch in passes[self.done] if self.done < len(passes) else ():
                for owner, rows in self._owners(batch, expert=index == 0).items():
                    if not self._run(self._found[index], batch, owner, rows):
                        return math.nan
        self.done += 1
        fitted = [statistics.fit(statistics.solved()) for statistics in self._combined().values()]
        return sum(fit.error for fit in fitted) / max(sum(fit.size for fit in fitted), 1e-30)

    def _owners(self, batch: Batch, *, expert: bool) -> dict[int | None, list[int]]:
        """Which rows are run with which adapter; None for the base model."""
        everyone = list(range(len(self._names))) if expert else [None]
        owners: dict[int | None, list[int]] = {}
        for row, task in enumerate(batch.tasks):
            for owner in [self._names.index(task)] if task in self._names else everyone:
                owners.setdefault(owner, []).append(row)
        return owners

    def _run(self, found: Mapping[str, Moments], batch: Batch, owner: int | None, rows: Sequence[int]) -> bool:
        alone = torch.zeros(len(self._sum.modules), len(self._names))
        if owner is not None:
            alone[:, owner] = 1
        ids, there = batch.ids[list(rows)], batch.there[list(rows)]
        seen: dict[str, Tensor] = {}
        with (
            self._model.attached(self._sum.branches(alone)),
            self._model.watched({module: partial(_keep, seen, module, there) for module in found}),
        ):
            self._model.logits(ids, there)
        if not all(bool(inputs.isfinite().all()) for inputs in seen.values()):
            return False
        for module, inputs in seen.items():
            found[module].add(inputs, owner)
        return True

    def _combined(self) -> dict[str, Moments]:
        return {
            module: self._kind.combined([found[module] for found in self._found], self._weights)
            for module in self._modules
        }

    def value(self) -> float:
        if not self.done:
            return self._value_of(self._plain)
        found = {module: statistics.solved() for module, statistics in self._combined().items()}
        adapters = corrected(self._adapters, found)
        live, size = Sum(adapters, self._sum.modules, self._model.device), (len(self._sum.modules), len(adapters))
        tried = {scale: self._value_of(live.branches(torch.full(size, scale))) for scale in SCALES}
        finite = {scale: value for scale, value in tried.items() if math.isfinite(value)}
        if not finite:
            return math.nan
        scale = min(finite, key=finite.__getitem__)
        self._learned = Learned(adapters=tuple(adapters), scale=scale)
        return finite[scale]

    def _value_of(self, branches: Mapping[str, Branch]) -> float:
        with torch.no_grad(), self._model.attached(branches):
            return self._goal.value(self._model)

    def learned(self) -> Learned:
        return self._learned

    def notes(self) -> list[str]:
        plain, fitted = Fit(0.0, 0.0), Fit(0.0, 0.0)
        for module, statistics in self._combined().items():
            plain = _added(plain, statistics.fit(self._sum.terms(module).A.double()))
            fitted = _added(fitted, statistics.fit(statistics.solved()))
        return [
            f"the fit to what each adapter does alone leaves {fitted.error / fitted.size:.1%} of it, at λ = 1; the plain sum "
            f"is {plain.error / plain.size:.1%} off; λ = {self._learned.scale:g} by the objective"
        ]

    def state(self) -> dict[str, Tensor]:
        return {
            f"{index}/{module}/{name}": value
            for index, found in enumerate(self._found)
            for module, statistics in found.items()
            for name, value in statistics.moments.items()
        }

    def load(self, state: Mapping[str, Tensor], done: int) -> None:
        for index, found in enumerate(self._found):
            for module, statistics in found.items():
                for name in statistics.moments:
                    statistics.moments[name] = state[f"{index}/{module}/{name}"].to(self._model.device)
        self.done = done


def _keep(seen: dict[str, Tensor], module: str, there: Tensor, inputs: Tensor) -> None:
    seen[module] = inputs[there]


def _added(one: Fit, other: Fit) -> Fit:
    return Fit(one.error + other.error, one.size + other.size)
