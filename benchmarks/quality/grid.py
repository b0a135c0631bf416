# SPDX-License-Identifier: Apache-2.0
"""Which merges are measured, the most telling first, and what they cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

from benchmarks.quality.records import Row, key
from benchmarks.quality.settings import Settings
from vllm_merge.methods.registry import MethodSpec, default_registry, list_methods

LOSSLESS = "lossless"
EPSILON = 0.15  # the default of della
PAIRS = "pairs"  # the stage whose merges are not averaged: each pair of tasks is a point
# What the claims are about, and a few to put beside: measured before all others.
FIRST = (
    ("task_arithmetic", "core"),
    ("ties", "knots"),
    ("ties", "delta"),
    ("tsv_m", "core"),
    ("iso_c", "core"),
    ("iso_cts", "core"),
    ("ctm", "core"),
    ("do_merging", "knots"),
    ("wudi", "core"),
    ("dare_ties", "knots"),
    ("ties", "core"),
    ("robustmerge", "factors"),
)
PREDICTED = FIRST[:4]  # whose losses on pairs the interference report is to predict
UNEQUAL = (("task_arithmetic", "core"), ("do_merging", "knots"))  # on pairs of very different norms
CURVE = (4, 8, 32, 64)
SECONDS = {"cuda": 1.5, "cpu": 20.0}  # of a merge of all tasks, before any was timed


@dataclass(frozen=True)
class Config:
    """One merge to measure: λ (and density) chosen on validation, then the tests."""

    set: str
    seed: int
    tasks: tuple[str, ...]
    method: str
    space: str
    rank: int | str
    stage: str = ""

    def row(self) -> Row:
        """The start of its row."""
        return {"kind": "merge", **asdict(self), "tasks": list(self.tasks)}


def spaces(spec: MethodSpec) -> tuple[str, ...]:
    """The spaces in which the method gives different results; a weighted sum is the same in all of them."""
    return (spec.default_space,) if spec.coefficients is not None else spec.spaces


def every_method(size: int) -> Iterator[tuple[str, str]]:
    """Methods and spaces that take this many adapters, those of FIRST first."""
    registered = [
        (spec.name, space)
        for spec in list_methods()
        for space in spaces(spec)
        if spec.most_adapters is None or spec.most_adapters >= size
    ]
    yield from (entry for entry in FIRST if entry in registered)
    yield from (entry for entry in registered if entry not in FIRST)


def groups(tasks: Sequence[str], size: int) -> list[tuple[str, ...]]:
    """The tasks in parts of this size; what is left over is left out."""
    return [tuple(tasks[start : start + size]) for start in range(0, len(tasks) - size + 1, size)]


def plan(
    settings: Settings, tasks: Sequence[str], methods: Sequence[str] | None = None, stages: Sequence[str] | None = None
) -> list[Config]:
    """All merges in order, each once. methods, stages: only these."""
    found: dict[str, Config] = {}
    for config in _stages(settings, tasks):
        if (methods is None or config.method in methods) and (stages is None or config.stage in stages):
            found.setdefault(key(config.row()), config)
    return list(found.values())


def _stages(settings: Settings, tasks: Sequence[str]) -> Iterator[Config]:
    largest = min(settings.tasks, len(tasks))
    ranks: tuple[int | str, ...] = (LOSSLESS, *settings.ranks)

    def stage(name: str, kind: str, seeds: Sequence[int], size: int, entries: Any, at: Any = ranks) -> Iterator[Config]:
        for seed in seeds:
            for method, space in entries:
                for group in groups(tasks, size):
                    for rank in at:
                        yield Config(kind, seed, group, method, space, rank, name)

    first, seeds = settings.seeds[:1], settings.seeds
    smaller = sorted((size for size in settings.sizes if size < largest), reverse=True)
    everything, few = list(every_method(largest)), [e for e in every_method(largest) if e in FIRST]
    yield from stage("all tasks", "plain", seeds, largest, few)
    yield from stage("osrm", "osrm", seeds, largest, few, (LOSSLESS,))
    yield from stage("mixed", "mixed", seeds, largest, few, (LOSSLESS,))
    for size in smaller[:1]:
        yield from stage(f"{size} tasks", "plain", seeds, size, _first(size), (LOSSLESS,))
    yield from _pairs("plain", first[0], tasks[:largest], PREDICTED)
    for size in smaller[1:]:
        yield from stage(f"{size} tasks", "plain", seeds, size, _first(size), (LOSSLESS,))
    yield from stage("ranks", "plain", first, largest, few, CURVE)
    yield from stage("all tasks", "plain", first, largest, everything)
    yield from _pairs("mixed", first[0], tasks[:largest], UNEQUAL)
    yield from stage("all tasks", "plain", seeds, largest, everything)
    for kind in ("osrm", "mixed"):
        yield from stage(kind, kind, seeds, largest, few)
    for size in smaller:
        yield from stage(f"{size} tasks", "plain", seeds, size, _first(size))
    yield from stage("osrm", "osrm", seeds, largest, everything)
    for size in smaller:
        yield from stage(f"{size} tasks", "osrm", seeds, size, _first(size))
    yield from stage("mixed", "mixed", seeds, largest, everything)
    yield from stage("osrm-mean", "osrm-mean", seeds, largest, few)
    for size in smaller:
        yield from stage(f"{size} tasks", "plain", seeds, size, list(every_method(size)))


def _pairs(kind: str, seed: int, tasks: Sequence[str], entries: Sequence[tuple[str, str]]) -> Iterator[Config]:
    for pair in combinations(tasks, 2):
        for method, space in entries:
            yield Config(kind, seed, pair, method, space, LOSSLESS, PAIRS)


def _first(size: int) -> list[tuple[str, str]]:
    """Those of FIRST that take this many adapters."""
    return [entry for entry in every_method(size) if entry in FIRST]


def estimate(configs: Sequence[Config], rows: Sequence[Row], device: str, jobs: int) -> float:
    """Seconds for all of them: by the mean of what was measured, or SECONDS, in proportion to the tasks."""
    timed = [(row["wall"], len(row["tasks"])) for row in rows if row["kind"] == "merge" and "wall" in row]
    largest = max((len(config.tasks) for config in configs), default=1)
    each = sum(w for w, _ in timed) / sum(n for _, n in timed) if timed else SECONDS[device] / largest
    return each * sum(len(config.tasks) for config in configs) / jobs


def parameters_of(method: str, rank: int | str, lam: float, density: float | None) -> dict[str, Any]:
    """What a recipe gives the method; all else stays at its default. A method that keeps entries with probabilities around
    the density, from density − epsilon to density + epsilon, gets the default or what keeps them between 0 and 1."""
    names = {parameter.name for parameter in default_registry().get(method).parameters}
    found: dict[str, Any] = {"lambda": lam}
    if density is not None:
        found["density"] = density
        if {"density", "epsilon"} <= names:
            found["epsilon"] = min(EPSILON, round(0.9 * min(density, 1 - density), 6))
    if "target_rank" in names and rank != LOSSLESS:
        found["target_rank"] = rank
    return found
