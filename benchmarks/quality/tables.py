# SPDX-License-Identifier: Apache-2.0
"""The parts of the pages of evidence: each a table with the sentences that say how to read it; nothing where nothing was measured."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.quality.claims import UNMEASURED, Claim, counted
from benchmarks.quality.grid import LOSSLESS
from benchmarks.quality.predictors import PREDICTS, Predictor
from benchmarks.quality.recorded import Recorded
from benchmarks.quality.records import WEIGHTS
from benchmarks.quality.scores import Family, Interval, Scores, adapters
from benchmarks.quality.served import SERVED

ADDED_UP = "added up; several shared a device"


def verdicts(found: Sequence[Claim]) -> Iterator[str]:
    if all(claim.verdict == UNMEASURED for claim in found):
        yield "Not measured yet.\n"
        return
    yield "| claim | from | verdict | difference or score, points (95 % interval) |\n|---|---|---|---|"
    for claim in found:
        yield f"| {claim.text} | {claim.source} | **{claim.verdict}** | {claim.found} |"
    yield ""


def gate(run: Mapping[str, Any], scores: Scores) -> Iterator[str]:
    yield "Accuracy on the tests, %, the mean over seeds.\n"
    kinds = adapters(scores)
    yield "| task | chance | base, few-shot | " + " | ".join(f"{kind} adapter" for kind in kinds) + " | counts |"
    yield "|---|---|---|" + "---|" * (len(kinds) + 1)
    for task, row in run["gate"]["tasks"].items():
        own = [f"{100 * kinds[kind][task]:.1f}" if task in kinds[kind] else "" for kind in kinds]
        if task not in scores.tasks:
            own[list(kinds).index("plain")] = f"{100 * row['single']:.1f}"
        counts = "yes" if task in scores.tasks else "no" if not row["counts"] else "spare"
        yield f"| {task} | {100 * row['chance']:.1f} | {100 * row['base']:.1f} | {' | '.join(own)} | {counts} |"
    if scores.left_out:
        yield f"\nLeft out of the scores of their set and seed, because the adapter is less than {100 * scores.gate:.0f} points above chance:\n"
        yield "| adapters | seed | task | above chance, points | norm of ΔW | of the others, the median |\n|---|---|---|---|---|---|"
        for one in scores.left_out:
            norms = {
                row["task"]: row["norm"]
                for row in scores.singles.values()
                if (row["set"], row["seed"]) == (one.set, one.seed) and row["task"] in scores.tasks and "norm" in row
            }
            others = median([norm for task, norm in norms.items() if task != one.task])
            yield f"| {one.set} | {one.seed} | {one.task} | {100 * one.above:+.1f} | {norms[one.task]:.0f} | {others:.0f} |"
        yield "\nThey are among what is merged all the same, and λ was chosen with them."
    yield ""


def minutes(found: Recorded) -> Iterator[str]:
    """What was spent on which device."""
    run, device = found.run, found.device
    yield "Time:\n\n| part | device | minutes |\n|---|---|---|"
    parts: list[tuple[str, str, float]] = []
    if "base" in run:
        parts.append(("the base and its tokenizer", run["base"].get("device", device), run["base"]["seconds"] / 60))
    calls = run.get("calls", [])
    timed = {(call.get("what", "merges"), call["device"]) for call in calls}
    for call in calls:
        what = call.get("what", "merges")
        also = ", with the training of what was missing," if what == "merges" else ""
        parts.append(
            (f"{what}{also} in {counted(call['jobs'], 'process', 'processes')}", call["device"], call["minutes"])
        )
    for name, part in run.items():
        if name.startswith("adapters "):
            where = part.get("device", device)
            which = f"{part['adapters']} {name.removeprefix('adapters ')} adapters"
            within = ", of the minutes of merges" if ("merges", where) in timed else ""
            parts.append((f"training {which}{within}", where, part["seconds"] / 60))
    walls: dict[str, list[float]] = {}
    for row in found.rows:
        if row["kind"] == "merge" and "wall" in row and ("merges", mine := row.get("device", device)) not in timed:
            walls.setdefault(mine, []).append(row["wall"])
    for mine, seconds in walls.items():
        parts.append((f"{counted(len(seconds), 'merge')}, {ADDED_UP}", mine, sum(seconds) / 60))
    learning = {(row["method"], row["seed"]): row["seconds"] for row in found.rows if row["kind"] == "learned"}
    if learning and ("learners", device) not in timed:
        parts.append((f"{counted(len(learning), 'learner')}, {ADDED_UP}", device, sum(learning.values()) / 60))
    yield from (f"| {what} | {where} | {minutes:.1f} |" for what, where, minutes in parts)
    yield ""


def merges(found: Recorded, kind: str, size: int) -> Iterator[str]:
    scores, rank = found.scores, found.rank
    those = [f for f in scores.families if (f.set, f.size) == (kind, size)]
    ranks = [r for r in (LOSSLESS, str(rank)) if any(family.rank == r for family in those)]
    if not ranks:
        return
    yield "Score, % (95 % interval); the seeds, and the seconds of the merge. An interval of one seed does not know how much seeds differ."
    yield from _elsewhere(found, those)
    heads = [f"rank {r}" if r != LOSSLESS else r for r in ranks]
    yield f"\n| method | space | {' | '.join(heads)} | seeds | seconds |\n|---|---|{'---|' * len(ranks)}---|---|"
    lines = []
    for method, space in {(family.method, family.space) for family in those}:
        families = {r: Family(kind, size, method, space, r) for r in ranks}
        there = {r: family for r, family in families.items() if family in scores.families}
        if not there:
            continue
        cells = [scores.score(there[r]).in_words() if r in there else "" for r in ranks]
        first = next(iter(there.values()))
        seeds = max(len(scores.families[family]) for family in there.values())
        line = f"| {method} | {space} | {' | '.join(cells)} | {seeds} | {scores.seconds(first):.2g} |"
        lines.append((-scores.score(first).value, line))
    yield from (line for _, line in sorted(lines))
    yield ""


def _elsewhere(found: Recorded, families: Iterable[Family]) -> Iterator[str]:
    """Which of them were measured on another device than the rest."""
    devices: dict[str, set[str]] = {}
    for family in families:
        for row in (row for rows in found.scores.families[family].values() for row in rows):
            devices.setdefault(row.get("device", found.device), set()).add(f"{family.method} {family.space}")
    for device, names in devices.items():
        if device != found.device:
            yield f"Measured on a {device}: {', '.join(sorted(names))}."


def lambdas(scores: Scores) -> Iterator[str]:
    """Where the search for λ ended, and who refused."""
    searched = [row for row in scores.merges if "at_edge" in row]
    at_end = [row for row in searched if row["at_edge"]]
    if at_end:
        most = Counter(f"{row['method']} {row['space']}" for row in at_end).most_common(3)
        names = ", ".join(f"{name} ({count})" for name, count in most)
        yield f"In {len(at_end)} of {len(searched)} searches the best λ is at an end of its range, and might be better beyond it; most often of {names}.\n"
    for refused in sorted({f"{row['method']} of the {row['set']} adapters: {row['error']}" for row in scores.errors}):
        yield f"Refused: {refused}.\n"


def joint(scores: Scores, tests: int) -> Iterator[str]:
    """Hits@k when the label is chosen among those of all tasks."""
    rows = [row for row in scores.merges if "hits" in row and row["rank"] == LOSSLESS]
    if not rows:
        return
    yield "The joint setting of KnOTS: the label is chosen among those of all tasks. Lossless, on the first"
    yield f"{tests} tests of each task: hits@1, @3, @5, %, the mean over all tasks and seeds.\n"
    yield "| method | space | adapters | @1 | @3 | @5 |\n|---|---|---|---|---|---|"
    found: dict[tuple[str, str, str], list[list[float]]] = {}
    for row in rows:
        hits = [sum(task[k] for task in row["hits"].values()) / len(row["hits"]) for k in ("1", "3", "5")]
        found.setdefault((row["method"], row["space"], row["set"]), []).append(hits)
    means = {name: [sum(column) / len(mine) for column in zip(*mine, strict=True)] for name, mine in found.items()}
    for (method, space, kind), hits in sorted(means.items(), key=lambda item: -item[1][0]):
        yield f"| {method} | {space} | {kind} | {' | '.join(f'{100 * value:.1f}' for value in hits)} |"
    yield ""


def predicting(found: Sequence[Predictor]) -> Iterator[str]:
    if not found:
        return
    yield "Spearman's rank correlation of each number with 1 − score, over all pairs of tasks, lossless: two adapters with a larger number lose more"
    yield "where it is positive. Pairs share tasks, so the interval (95 %) draws tasks, and p permutes them (Mantel), after Holm for all rows."
    clear = sum(one.verdict == PREDICTS for one in found)
    yield f"**{clear or 'None'} of {len(found)} {'foretells' if clear == 1 else 'foretell'} the loss.**\n"
    yield "| number | method | pairs | correlation | p | |\n|---|---|---|---|---|---|"
    for one in found:
        words = f"{one.correlation.value:+.2f} ({one.correlation.low:+.2f} to {one.correlation.high:+.2f})"
        yield f"| {one.number} | {one.method} | {one.pairs} | {words} | {one.p:.2g} | {one.verdict} |"
    yield ""


def served(results: Path, run: Mapping[str, Any]) -> Iterator[str]:
    path = results / SERVED
    served = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    rows = [row for row in served if row["weights"] in run.get(WEIGHTS, {}).values()]
    if not rows:
        return
    yield "Accuracy, mean over the tasks, %: of the same recipe in a vLLM server on a CPU, and as recorded offline, on the same"
    yield "examples; the difference in points (95 % interval, paired); and on how many of the examples both are right or both are wrong.\n"
    yield "| recipe | offline | served | difference | within noise | agreement | examples |\n|---|---|---|---|---|---|---|"
    for row in rows:
        offline, served, agreement = (f"{100 * row[name]:.1f}" for name in ("offline", "served", "agreement"))
        difference = Interval(row["difference"], row["low"], row["high"]).in_words(sign=True)
        within = "yes" if row["within_noise"] else "**no**"
        yield f"| {row['recipe']} | {offline} | {served} | {difference} | {within} | {agreement} | {row['examples']} |"
    yield ""
