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
from benchmarks.quality.predictors import PREDICTS, Gains, Predictor
from benchmarks.quality.recorded import Recorded
from benchmarks.quality.records import WEIGHTS
from benchmarks.quality.scores import Family, Interval, Scores, adapters, curves
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
    parts += [(_call(call), _devices(call), call["minutes"]) for call in calls]
    for name, part in run.items():
        if name.startswith("adapters "):
            where = part.get("device", device)
            which = f"{part['adapters']} {name.removeprefix('adapters ')} adapters"
            within = ", of the minutes of merges" if any(_trained(call, name, where) for call in calls) else ""
            parts.append((f"training {which}{within}", where, part["seconds"] / 60))
    walls: dict[str, list[float]] = {}
    for row in found.rows:
        if row["kind"] == "merge" and "wall" in row:
            walls.setdefault(row.get("device", device), []).append(row["wall"])
    for mine, seconds in walls.items():
        if not _covered(calls, "merges", mine, len(seconds)):
            parts.append((f"{counted(len(seconds), 'merge')}, {ADDED_UP}", mine, sum(seconds) / 60))
    learning: dict[str, dict[tuple[str, int], float]] = {}
    for row in found.rows:
        if row["kind"] == "learned":
            learning.setdefault(row.get("device", device), {})[row["method"], row["seed"]] = row["seconds"]
    for mine, runs in learning.items():
        if not _covered(calls, "learners", mine, len(runs)):
            parts.append((f"{counted(len(runs), 'learner')}, {ADDED_UP}", mine, sum(runs.values()) / 60))
    yield from (f"| {what} | {where} | {minutes:.1f} |" for what, where, minutes in parts)
    yield ""


def _call(call: Mapping[str, Any]) -> str:
    """What a call did. One of those first recorded says neither how much it measured nor what it trained, and is of merges."""
    what = call.get("what", "merges")
    merging = what == "merges"
    if "count" in call:
        what = counted(call["count"], what.removesuffix("s"))
    also = ", with the training of what was missing," if merging and call.get("trained", True) else ""
    return f"{what}{also} in {counted(call['jobs'], 'process', 'processes')}"


def _devices(call: Mapping[str, Any]) -> str:
    several = call.get("devices", 1)
    return f"{several} × {call['device']}" if several > 1 else str(call["device"])


def _trained(call: Mapping[str, Any], name: str, device: str) -> bool:
    """Whether a set of adapters was trained within a call that measured merges."""
    kind = name.removeprefix("adapters ")
    return (call.get("what", "merges"), call["device"]) == ("merges", device) and kind in call.get("trained", [kind])


def _covered(calls: Sequence[Mapping[str, Any]], what: str, device: str, rows: int) -> bool:
    """Whether the calls are all of what was measured there."""
    mine = [call for call in calls if (call.get("what", "merges"), call["device"]) == (what, device)]
    return bool(mine) and sum(call.get("count", rows) for call in mine) >= rows


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
    yield from (f"{sentence}\n" for r in ranks for sentence in _told_apart(scores, [f for f in those if f.rank == r]))


def _told_apart(scores: Scores, families: Sequence[Family]) -> Iterator[str]:
    """Of families of one rank: from which others the best on the tests is told, and which are told from the plain sum."""
    if len(families) < 3:
        return
    best = max(families, key=lambda family: scores.score(family).value)
    beside = {family: scores.difference(best, family) for family in families if family != best}
    near = [family for family, gain in beside.items() if gain is None or gain.low <= 0]
    at = LOSSLESS.capitalize() if best.rank == LOSSLESS else f"Rank {best.rank}"
    yield f"{at}: {_name(best)} is clearly above {len(beside) - len(near)} of {len(beside)} others{', not' * bool(near)}{_names(near)}."
    plain = best.other(method="task_arithmetic", space="core")
    gains = {f: scores.difference(f, plain) for f in families if f != plain} if plain in families else {}
    told = [(f, gain) for f, gain in gains.items() if gain is not None]
    if told:
        above, below = [f for f, gain in told if gain.low > 0], [f for f, gain in told if gain.high < 0]
        yield f"{at}: clearly above {_name(plain)} are {len(above)} of {len(told)}{_names(above)}, clearly below {len(below)}{_names(below)}."


def _name(family: Family) -> str:
    return f"{family.method} {family.space}"


def _names(families: Sequence[Family]) -> str:
    """In brackets, after a space; nothing of none."""
    return f" ({', '.join(sorted(map(_name, families)))})" if families else ""


def ranks(scores: Scores) -> Iterator[str]:
    """The curves of the plot in numbers."""
    found = curves(scores)
    columns = max(found.values(), key=len, default={})
    if not columns:
        return
    yield f"The same in %:\n\n| method | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}"
    for name, curve in found.items():
        cells = [f"{100 * curve[rank]:.1f}" if rank in curve else "" for rank in columns]
        yield f"| {name} | {' | '.join(cells)} |"
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
    yield "Spearman's rank correlation of each number with 1 − score, over all pairs of tasks, lossless, plain adapters but where it says mixed: two adapters"
    yield "with a larger number lose more where it is positive. Pairs share tasks, so the interval (95 %) draws tasks, and p permutes them (Mantel), after Holm for all rows."
    clear = sum(one.verdict == PREDICTS for one in found)
    yield f"**{clear or 'None'} of {len(found)} {'foretells' if clear == 1 else 'foretell'} the loss.**\n"
    yield "| number | method | pairs | correlation | p | |\n|---|---|---|---|---|---|"
    for one in found:
        words = f"{one.correlation.value:+.2f} ({one.correlation.low:+.2f} to {one.correlation.high:+.2f})"
        yield f"| {one.number} | {one.method} | {one.pairs} | {words} | {one.p:.2g} | {one.verdict} |"
    yield ""


def norms(found: Gains | None) -> Iterator[str]:
    """What is to be read from the plot of pairs with unequal norms."""
    if found is None:
        return
    above, way = sum(gain > 0 for gain in found.gains), found.with_ratio
    yield f"Of {len(found.gains)} pairs of mixed adapters, one seed, DO-Merging is above task arithmetic on {above}, by {found.mean.in_words(sign=True)} points in the mean;"
    rho = f"{way.correlation.value:+.2f} ({way.correlation.low:+.2f} to {way.correlation.high:+.2f})"
    yield f"Spearman's rank correlation of the gain with the ratio of the norms is {rho}, p {way.p:.2g}. Intervals and p as [above](#does-the-interference-report-foresee-the-loss).\n"


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
