# SPDX-License-Identifier: Apache-2.0
"""Whether it matters how tasks are asked, and how fast adapters learn: two sets of results beside each other, and a look at
other learning rates that is recorded in exploration.jsonl."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.quality.grid import FIRST, LOSSLESS
from benchmarks.quality.learning import METHODS, SPACE, with_learned
from benchmarks.quality.recorded import Recorded
from benchmarks.quality.records import Row
from benchmarks.quality.scores import Family, Scores

EXPLORATION = "exploration.jsonl"
SAME = "same words, "  # before the names of the sets of the older results, in scores of both


def compared(own: Recorded, same: Recorded) -> Iterator[str]:
    """A table of what both sets measured of all tasks: each score, and the paired difference."""
    rows = [*own.rows, *(_renamed(row) for row in same.rows if row["kind"] != "base")]
    scores = with_learned(rows, own.scores.tasks, own.scores.gate)
    entries = [*FIRST, *((method, SPACE) for method in METHODS)]
    lines: list[tuple[float, str]] = []
    means: list[str] = []
    sizes = [len(scores.tasks), *sorted({f.size for f in own.scores.families} - {len(scores.tasks)}, reverse=True)]
    for size, kind, rank in product(sizes, ("plain", "osrm"), (LOSSLESS, str(own.rank))):
        families = [Family(kind, size, method, space, rank) for method, space in entries]
        pairs = [(one, one.other(set=SAME + kind)) for one in families]
        there = [pair for pair in pairs if scores.difference(*pair) is not None]
        whole = size == len(scores.tasks)
        lines += [_line(scores, *pair) for pair in there] if kind == "plain" and whole else []
        plainly = [pair for pair in there if pair[0].space != SPACE]
        mean = scores.mean_difference(plainly)
        if mean is not None:
            at = "lossless" if rank == LOSSLESS else f"rank {rank}"
            of = f"{len(plainly)} methods with {kind} adapters{'' if whole else f' of {size} tasks'}, {at}"
            means.append(f"{mean.in_words(sign=True)} on average of {of}")
    if not lines:
        return
    yield f"{len(scores.tasks)} tasks, plain adapters; score in %, gain in points, with 95 % intervals, on the same tests and on the tasks that the adapters of"
    yield f"both learnt. Own words give {'; '.join(means)}.\n"
    yield "| method | space | rank | own words | the same words | gain | seeds |\n|---|---|---|---|---|---|---|"
    yield from (line for _, line in sorted(lines))
    yield ""


def _renamed(row: Row) -> Row:
    return {**row, "set": SAME + row["set"]}


def _line(scores: Scores, one: Family, two: Family) -> tuple[float, str]:
    seeds, gain = scores.common_seeds((one, two)), scores.difference(one, two)
    assert gain is not None
    cells = [scores.score(a, seeds, beside=b).in_words() for a, b in ((one, two), (two, one))]
    words = (
        f"| {one.method} | {one.space} | {one.rank} | {' | '.join(cells)} | {gain.in_words(sign=True)} | {len(seeds)} |"
    )
    return -scores.score(one, seeds, beside=two).value, words


def explored(results: Path) -> Iterator[str]:
    """A table of the variants that were looked at; nothing without any."""
    path = results / EXPLORATION
    if not path.is_file():
        return
    variants: list[dict[str, Any]] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    merges = list(variants[0]["scores"])
    tasks = _learnt(variants)
    yield "A look at one seed, with adapters trained for it, before the run above: 500 steps, other learning rates, both ways to ask. Score in %, over the"
    yield f"{len(tasks)} tasks that all variants learnt ({', '.join(tasks)}); no intervals. ‖ΔW‖ as a share of the norm of what it changes. As recorded: `{EXPLORATION}`.\n"
    yield f"| words | learning rate | accuracy of the adapters, 8 tasks | ‖ΔW‖, % | {' | '.join(merges)} |"
    yield "|---|---|---|---|" + "---|" * len(merges)
    for one in variants:
        single, norms = one["single"].values(), one["norms"].values()
        sizes = f"{100 * min(norms):.1f} to {100 * max(norms):.1f}"
        found = [sum(one["scores"][merge]["by_task"][task] for task in tasks) / len(tasks) for merge in merges]
        cells = [f"{100 * sum(single) / len(single):.1f}", sizes, *(f"{100 * value:.1f}" for value in found)]
        yield f"| {one['words']} | {one['learning_rate']:g} | {' | '.join(cells)} |"
    yield ""


def _learnt(variants: Sequence[dict[str, Any]]) -> list[str]:
    """The tasks whose adapters every variant learnt."""
    unlearnt = {task for one in variants for task in one["unlearnt"]}
    return [task for task in variants[0]["single"] if task not in unlearnt]
