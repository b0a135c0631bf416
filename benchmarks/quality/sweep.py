# SPDX-License-Identifier: Apache-2.0
"""Measuring merges: the same number of trials for each to choose its λ (and density) on validation, then the tests."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from benchmarks.quality.grid import FIRST, LOSSLESS, Config, parameters_of
from benchmarks.quality.prepare import TEST, VALID, Bench, asked, machine, on_device, questions
from benchmarks.quality.records import Row, packed
from benchmarks.quality.scoring import Asked, Questions, Weights, joint_norm
from vllm_merge import Adapter, MergedAdapter, MergeError, merge
from vllm_merge.methods.registry import default_registry

# λ around the one at which the result is as large as the sum of the adapters: 15 trials for every method.
TRIALS = 15
LOW, HIGH = 0.25, 4.0
DENSITIES = (0.1, 0.3, 0.7)
JOINT = "joint"


def lambdas(count: int) -> list[float]:
    """Evenly spaced in the logarithm."""
    return [float(value) for value in np.geomspace(LOW, HIGH, count)]


@dataclass
class _Trial:
    score: float
    density: float | None
    factor: float
    lam: float
    merged: MergedAdapter
    deltas: Mapping[str, Tensor]
    seconds: float


@dataclass
class Sweep:
    """Measures configurations, one after another, on one device."""

    bench: Bench
    _adapters: dict[tuple[str, int], dict[str, Adapter]] = field(default_factory=dict)
    _identities: dict[tuple[str, int], str] = field(default_factory=dict)
    _norms: dict[tuple[str, int, tuple[str, ...]], float] = field(default_factory=dict)
    _questions: dict[tuple[tuple[str, ...], str], Questions] = field(default_factory=dict)

    @cached_property
    def _weights(self) -> Weights:
        return Weights(self.bench.model)

    def measure(self, config: Config) -> Row:
        """The row of a configuration; with `error` where the method refuses."""
        began = time.monotonic()
        row = {**config.row(), "weights": self._identity(config.set, config.seed), "device": machine(self.bench.device)}
        try:
            best = max(self._trials(config), key=lambda trial: trial.score)
        except MergeError as error:
            return {**row, "error": str(error)}
        self._weights.set(best.deltas, best.lam)
        row["lambda"], row["density"] = best.lam, best.density
        row["at_edge"] = best.factor in (lambdas(TRIALS)[0], lambdas(TRIALS)[-1])
        row["validation"] = round(best.score, 4)
        row["merge_seconds"] = round(best.seconds, 4)
        row["bits"] = self._tested(config.tasks)
        whole = len(config.tasks) == len(self.bench.counted()) and config.rank == LOSSLESS
        if whole and (config.method, config.space) in FIRST:
            row["hits"] = self._hits(config.tasks)
        row["report"] = _report(best.merged)
        self._weights.set({})
        row["wall"] = round(time.monotonic() - began, 3)
        return row

    def judged(self, tasks: Sequence[str], deltas: Mapping[str, Tensor], lams: Sequence[float]) -> Row:
        """Of ΔW by module: the λ that is best on validation, and what it gets right on the tests."""
        found = {}
        for lam in lams:
            self._weights.set(deltas, lam)
            found[lam] = self._validated(tasks)
        best = max(found, key=found.__getitem__)
        self._weights.set(deltas, best)
        bits = self._tested(tasks)
        self._weights.set({})
        return {"lambda": round(best, 4), "validation": round(found[best], 4), "bits": bits}

    def _trials(self, config: Config) -> Iterator[_Trial]:
        spec = default_registry().get(config.method)
        dense = any(parameter.name == "density" for parameter in spec.parameters)
        densities: Sequence[float | None] = DENSITIES if dense else (None,)
        size = self._sum_norm(config)
        for density in densities:
            started = time.perf_counter()
            merged = self._merge(config, density)
            if self.bench.device.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - started
            deltas = {module: merged.delta(module) for module in merged.factors}
            norm = joint_norm(deltas.values())
            if norm == 0:
                raise MergeError("the result is zero")
            for factor in lambdas(TRIALS // len(densities)):
                lam = factor * size / norm
                self._weights.set(deltas, lam)
                yield _Trial(self._validated(config.tasks), density, factor, lam, merged, deltas, seconds)

    def _merge(self, config: Config, density: float | None) -> MergedAdapter:
        return merge(
            [self._loaded(config.set, config.seed)[task] for task in config.tasks],
            merge_method=config.method,
            space=config.space,
            parameters=parameters_of(config.method, config.rank, 1.0, density),
            rank=config.rank,
            device=self.bench.device,
            seed=config.seed,
            report="full" if len(config.tasks) == 2 and config.rank == LOSSLESS else "brief",  # what `predictors` reads
        )

    def _identity(self, kind: str, seed: int) -> str:
        if (kind, seed) not in self._identities:
            self._identities[kind, seed] = self.bench.identity(kind, seed)
        return self._identities[kind, seed]

    def _loaded(self, kind: str, seed: int) -> dict[str, Adapter]:
        if (kind, seed) not in self._adapters:
            found = {}
            for task in self.bench.counted():
                adapter = Adapter.from_peft(self.bench.adapter(kind, seed, task))
                pairs = on_device(adapter.factors, self.bench.device)
                found[task] = Adapter(task, pairs, content_hash=adapter.content_hash)
            self._adapters[kind, seed] = found
        return self._adapters[kind, seed]

    def _sum_norm(self, config: Config) -> float:
        """‖Σ ΔW_i‖_F over the whole model."""
        key = config.set, config.seed, config.tasks
        if key not in self._norms:
            sums: dict[str, Tensor] = {}
            for task in config.tasks:
                for module, pair in self._loaded(config.set, config.seed)[task].factors.items():
                    sums[module] = sums[module] + pair.delta() if module in sums else pair.delta()
            self._norms[key] = joint_norm(sums.values())
        return self._norms[key]

    def _of(self, tasks: Sequence[str], split: str) -> Questions:
        key = tuple(tasks), split
        if key not in self._questions:
            wanted = [asked(self.bench, task, split) for task in tasks]
            self._questions[key] = questions(self.bench, self._jointly(wanted) if split == JOINT else wanted)
        return self._questions[key]

    def _validated(self, tasks: Sequence[str]) -> float:
        """Chance-corrected accuracy, the mean over the tasks."""
        found = []
        for task, right in zip(tasks, self._of(tasks, VALID).correct(self.bench.model), strict=True):
            chance = self.bench.tasks[task].chance
            found.append((float(right.mean()) - chance) / (1 - chance))
        return sum(found) / len(found)

    def _tested(self, tasks: Sequence[str]) -> dict[str, str]:
        """Right or wrong for every test, packed."""
        pairs = zip(tasks, self._of(tasks, TEST).correct(self.bench.model), strict=True)
        return {task: packed(right) for task, right in pairs}

    def _jointly(self, wanted: Sequence[Asked]) -> list[Asked]:
        """The first tests of each with the labels of all (the joint setting of KnOTS)."""
        labels = list(dict.fromkeys(label for one in wanted for label in one.labels))
        found = []
        for one in wanted:
            examples = one.examples[: self.bench.settings.joint]
            right = [labels.index(one.labels[example.label]) for example in examples]
            found.append(replace(one, examples=examples, labels=labels, right=right))
        return found

    def _hits(self, tasks: Sequence[str]) -> dict[str, dict[str, float]]:
        """Hits@1, 3 and 5 of every task in the joint setting."""
        pairs = zip(tasks, self._of(tasks, JOINT).places(self.bench.model), strict=True)
        return {task: {str(k): round(float((places < k).mean()), 4) for k in (1, 3, 5)} for task, places in pairs}


def _report(merged: MergedAdapter) -> dict[str, float | None]:
    """What the interference report says of the adapters and the result, as single numbers."""
    overall = merged.report.overall
    if not overall:
        return {}
    norms = [norm for norm in overall["input_norms"] if norm > 0]
    numbers: dict[str, float | None] = {
        "cosine": _mean([abs(value) for value in overall["cosines"] if value is not None]),
        "output overlap": _mean([value for value in overall["column_overlaps"] if value is not None]),
        "input overlap": _mean([value for value in overall["row_overlaps"] if value is not None]),
        "sign conflict": overall["sign_conflict"],
        "norm ratio": max(norms) / min(norms),
        "least cosine with result": min((v for v in overall["result_cosines"] if v is not None), default=None),
        "effective rank": overall["effective_rank"],
        "energy kept": overall["energy_kept"],
    }
    return {name: None if value is None else round(float(value), 5) for name, value in numbers.items()}


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
