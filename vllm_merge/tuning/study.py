# SPDX-License-Identifier: Apache-2.0
"""A study of Optuna, asked for one candidate at a time: TPE with Hyperband (arXiv:1603.06560), or random search.

Every candidate is drawn by a sampler seeded with its number, and the brackets of Hyperband follow from that number: a study that
goes on from its record makes the candidates that it would have made without the break.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from vllm_merge.errors import MergeError
from vllm_merge.tuning.samples import FACTOR

SamplerName = Literal["tpe", "random"]
NAME = "lfs"  # Hyperband's brackets are drawn from it
Values = dict[str, Any]
Draw = Callable[[Any], Values]
"""Asks for each value by `suggest_float` and `suggest_categorical`."""


class Scored(Protocol):
    """How a candidate is scored: it reports the value at a size, and is told whether that is enough."""

    def __call__(self, values: Values, enough: Callable[[float, int], bool]) -> Sequence[float] | None:
        """The objectives at the last size that was looked at; None for a candidate without a value."""
        ...


class Study:
    """Candidates by Optuna. Several objectives, and random search, have every candidate scored at all sizes."""

    def __init__(
        self,
        draw: Draw,
        first: Sequence[Values],
        sizes: Sequence[int],
        objectives: int,
        sampler: SamplerName,
        seed: int,
    ) -> None:
        """first: the candidates to begin with. sizes: what candidates are scored at, one after the other."""
        self._optuna = _optuna()
        self._draw, self._first, self._sizes, self._sampler, self._seed = draw, first, sizes, sampler, seed
        self.halves = sampler == "tpe" and objectives == 1 and len(sizes) > 1
        pruners = self._optuna.pruners
        pruner = pruners.HyperbandPruner(sizes[0], sizes[-1], FACTOR) if self.halves else pruners.NopPruner()
        self._study = self._optuna.create_study(
            study_name=NAME, directions=["minimize"] * objectives, pruner=pruner, sampler=self._seeded(0)
        )

    def _seeded(self, number: int) -> Any:
        seed = (self._seed * 1_000_003 + number) % 2**32
        samplers = self._optuna.samplers
        if self._sampler == "random":
            return samplers.RandomSampler(seed=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", self._optuna.exceptions.ExperimentalWarning)
            # Values that are asked for together, such as a rule's own, are drawn together.
            return samplers.TPESampler(seed=seed, multivariate=True, group=True)

    def candidate(self, scored: Scored) -> tuple[Values, Sequence[float] | None, bool]:
        """Make a candidate and score it: its values, its objectives, and whether these are of the last size."""
        number = len(self._study.trials)
        self._study.sampler = self._seeded(number)
        if number < len(self._first):
            self._study.enqueue_trial(self._first[number])
        trial = self._study.ask()
        values = self._draw(trial)
        pruned = False

        def enough(value: float, size: int) -> bool:
            nonlocal pruned
            if self.halves:
                trial.report(value, size)
                pruned = size < self._sizes[-1] and trial.should_prune()
            return pruned

        found = scored(values, enough)
        states = self._optuna.trial.TrialState
        if found is None:
            self._study.tell(trial, state=states.FAIL)
        elif pruned:
            self._study.tell(trial, state=states.PRUNED)
        else:
            self._study.tell(trial, list(found))
        return values, found, found is not None and not pruned

    @property
    def complete(self) -> list[tuple[int, Values, list[float]]]:
        """Number, values and objectives of the candidates that were scored at the last size."""
        done = self._optuna.trial.TrialState.COMPLETE
        return [(one.number, one.params, one.values) for one in self._study.get_trials(states=(done,))]

    @property
    def made(self) -> int:
        """Candidates so far."""
        return len(self._study.trials)

    def record(self) -> Tensor:
        """All candidates, JSON as bytes."""
        rows = [
            {
                "state": one.state.name,
                "values": one.values,
                "params": one.params,
                "intermediate": one.intermediate_values,
                "attributes": one.system_attrs,
            }
            for one in self._study.trials
        ]
        return torch.frombuffer(bytearray(json.dumps(rows).encode()), dtype=torch.uint8)

    def load(self, record: Tensor) -> None:
        """Go on from a record."""
        trial = self._optuna.trial
        for row in json.loads(bytes(record.tolist())):
            asked = _Asked(row["params"], self._optuna.distributions)
            self._draw(asked)
            state = trial.TrialState[row["state"]]
            self._study.add_trial(
                trial.create_trial(
                    state=state,
                    values=row["values"] if state == trial.TrialState.COMPLETE else None,
                    params=row["params"],
                    distributions=asked.distributions,
                    intermediate_values={int(size): value for size, value in row["intermediate"].items()},
                    system_attrs=row["attributes"],
                )
            )


class _Asked:
    """Gives the values that a candidate had, and notes what each was drawn from."""

    def __init__(self, values: Mapping[str, Any], distributions: Any) -> None:
        self._values, self._kinds = values, distributions
        self.distributions: dict[str, Any] = {}

    def suggest_categorical(self, name: str, choices: Sequence[str]) -> Any:
        self.distributions[name] = self._kinds.CategoricalDistribution(choices)
        return self._values[name]

    def suggest_float(self, name: str, low: float, high: float) -> float:
        self.distributions[name] = self._kinds.FloatDistribution(low, high)
        return float(self._values[name])


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise MergeError(
            "optuna is not installed, which `--method lfs` searches with; install it with `pip install 'vllm-merge[tune]'`"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
