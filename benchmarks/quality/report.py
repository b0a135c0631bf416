# SPDX-License-Identifier: Apache-2.0
"""Tables, plots and the generated part of docs/evidence.md, from what is recorded; half a minute on a CPU, no model.

python -m benchmarks.quality.report [--results DIR] [--page FILE]
"""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.quality.claims import UNMEASURED, Claim, claims, goals
from benchmarks.quality.grid import LOSSLESS
from benchmarks.quality.learning import learned_goals, learned_runs, learned_table, with_learned
from benchmarks.quality.pages import BEGIN, END, renewed, write_tuning
from benchmarks.quality.plots import write_plots
from benchmarks.quality.predictors import PREDICTS, Predictor, predictors
from benchmarks.quality.records import WEIGHTS, Row, read_rows, read_run
from benchmarks.quality.scores import Family, Interval, Scores, adapters
from benchmarks.quality.served import SERVED
from benchmarks.quality.settings import Settings
from benchmarks.quality.unmeasured import unmeasured

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "quality"
PAGE, TUNING = ROOT / "docs" / "evidence.md", ROOT / "docs" / "tuning"
TITLES = {"plain": "Plain", "osrm": "OSRM", "osrm-mean": "OSRM (mean)", "mixed": "Mixed"}
CAPTIONS = {
    "seconds.png": "Score against the seconds of the merge, plain adapters.",
    "ranks.png": "Score against the rank of the result, plain adapters.",
    "norms.png": "DO-Merging over task arithmetic, against how unequal two adapters are.",
    "osrm.png": "Each method with plain adapters, and with adapters that started from OSRM, on the tasks that both learnt.",
    "tasks.png": "Score of every task under every method, plain adapters, lossless, the mean over seeds.",
}


def write_report(results: Path, page: Path, tuning: Path | None = None) -> dict[str, Any]:
    """Write summary.json and the plots to the results, and the generated parts of the page and of those in the folder `tuning`;
    the summary."""
    run, rows = read_run(results), read_rows(results)
    tasks: Sequence[str] = run.get("gate", {}).get("counted", [])
    rank, gate = (run["settings"]["ranks"][0], run["settings"]["gate"]) if run else (16, Settings.gate)
    scores, every = Scores(rows, tasks, gate), with_learned(rows, tasks, gate)
    learned = learned_runs(every, rows)
    found, own = claims(scores, rank), [*goals(scores, rank), *learned_goals(every, learned, rank)]
    predicting = predictors(scores)
    summary = {
        "run": {name: part for name, part in run.items() if name != "settings"},
        "left_out": [asdict(one) for one in scores.left_out],
        "families": [_entry(every, family) for family in sorted(every.families)],
        "claims": [asdict(claim) for claim in (*found, *own)],
        "learned": [asdict(one) for one in learned],
        "predictors": [asdict(predictor) for predictor in predicting],
        "lambdas_at_an_end": sum(row["at_edge"] for row in scores.merges if "at_edge" in row),
        "refused": sorted({f"{row['method']} {row['space']}: {row['error']}" for row in scores.errors}),
    }
    images = []
    if scores.families:
        (results / "summary.json").write_text(
            json.dumps(summary, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        images = write_plots(scores, results)
    parts = [*_claims(found, "What held and what failed"), *_claims(own, "Goals")]
    if scores.families:
        parts += [
            *_gate(run, scores),
            *_minutes(run, rows),
            *_tables(scores, rank),
            *learned_table(learned, len(tasks)),
            *_chosen(scores),
            *_joint(scores, run["settings"]["joint"]),
            *_predictors(predicting),
            *_served(results, run),
        ]
        parts += _images(images, results, page)
        parts += unmeasured(run, rows)
    block = "\n".join(parts)
    before = page.read_text(encoding="utf-8") if page.is_file() else f"# Evidence\n\n{BEGIN}\n{END}\n"
    page.write_text(renewed(before, block), encoding="utf-8")
    if tuning is not None:
        write_tuning(tuning, learned, len(tasks))
    return summary


def _entry(scores: Scores, family: Family) -> dict[str, Any]:
    score = scores.score(family)
    return {
        **asdict(family),
        "seeds": sorted(scores.families[family]),
        "score": round(score.value, 4),
        "low": round(score.low, 4),
        "high": round(score.high, 4),
        "accuracy": round(scores.accuracy(family), 4),
        "seconds": round(scores.seconds(family), 4),
        "tasks": {task: round(value, 4) for task, value in scores.by_task(family).items()},
    }


def _claims(found: Sequence[Claim], title: str) -> Iterator[str]:
    yield f"## {title}\n"
    if all(claim.verdict == UNMEASURED for claim in found):
        yield "Not measured yet.\n"
        return
    yield "| claim | from | verdict | difference or score, points (95 % interval) |\n|---|---|---|---|"
    for claim in found:
        yield f"| {claim.text} | {claim.source} | **{claim.verdict}** | {claim.found} |"
    yield ""


def _gate(run: dict[str, Any], scores: Scores) -> Iterator[str]:
    yield "## Tasks and adapters\n\nAccuracy on the tests, %, the mean over seeds.\n"
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


def _minutes(run: dict[str, Any], rows: Sequence[Row]) -> Iterator[str]:
    """What was spent on which device."""
    yield f"Time, on {run['device']}:\n\n| part | minutes |\n|---|---|"
    if "base" in run:
        yield f"| the base and its tokenizer | {run['base']['seconds'] / 60:.1f} |"
    for call in run.get("calls", []):
        what = call.get("what", "merges")
        also = ", with the training of adapters that were missing," if what == "merges" else ""
        yield f"| {what}{also} in {call['jobs']} processes | {call['minutes']:.1f} |"
    training = {name.removeprefix("adapters "): part for name, part in run.items() if name.startswith("adapters ")}
    for name, part in training.items():
        yield f"| of that {part['adapters']} {name} adapters | {part['seconds'] / 60:.1f} |"
    learning = {(row["method"], row["seed"]): row["seconds"] for row in rows if row["kind"] == "learned"}
    if learning and not any(call.get("what") == "learners" for call in run.get("calls", [])):
        yield f"| {len(learning)} learners, added up; several shared the device | {sum(learning.values()) / 60:.1f} |"
    yield ""


def _tables(scores: Scores, rank: int | str) -> Iterator[str]:
    sizes = sorted({family.size for family in scores.families}, reverse=True)
    for kind, size in [(kind, size) for kind in TITLES for size in sizes]:
        those = [f for f in scores.families if (f.set, f.size) == (kind, size)]
        ranks = [r for r in (LOSSLESS, str(rank)) if any(family.rank == r for family in those)]
        if not ranks:
            continue
        yield f"## {TITLES[kind]} adapters, {size} tasks\n\nScore, % (95 % interval); the seeds, and the seconds of the merge."
        yield "An interval of one seed does not know how much seeds differ.\n"
        heads = [f"rank {r}" if r != LOSSLESS else r for r in ranks]
        yield f"| method | space | {' | '.join(heads)} | seeds | seconds |\n|---|---|{'---|' * len(ranks)}---|---|"
        lines = []
        for method, space in {(family.method, family.space) for family in those}:
            found = {r: Family(kind, size, method, space, r) for r in ranks}
            there = {r: family for r, family in found.items() if family in scores.families}
            if not there:
                continue
            cells = [scores.score(there[r]).in_words() if r in there else "" for r in ranks]
            first = next(iter(there.values()))
            seeds = max(len(scores.families[family]) for family in there.values())
            line = f"| {method} | {space} | {' | '.join(cells)} | {seeds} | {scores.seconds(first):.2g} |"
            lines.append((-scores.score(first).value, line))
        yield from (line for _, line in sorted(lines))
        yield ""


def _chosen(scores: Scores) -> Iterator[str]:
    """Where the search for λ ended, and who refused."""
    searched = [row for row in scores.merges if "at_edge" in row]
    at_end = [row for row in searched if row["at_edge"]]
    if at_end:
        most = Counter(f"{row['method']} {row['space']}" for row in at_end).most_common(3)
        names = ", ".join(f"{name} ({count})" for name, count in most)
        yield "## The search for λ\n"
        yield f"In {len(at_end)} of {len(searched)} searches the best λ is at an end of its range, and might be better beyond it; most often of {names}.\n"
    for refused in sorted({f"{row['method']} of the {row['set']} adapters: {row['error']}" for row in scores.errors}):
        yield f"Refused: {refused}.\n"


def _joint(scores: Scores, tests: int) -> Iterator[str]:
    """Hits@k when the label is chosen among those of all tasks."""
    rows = [row for row in scores.merges if "hits" in row and row["rank"] == LOSSLESS]
    if not rows:
        return
    yield "## One label set for all tasks\n\nThe joint setting of KnOTS: the label is chosen among those of all tasks. Lossless, on the first"
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


def _predictors(found: Sequence[Predictor]) -> Iterator[str]:
    if not found:
        return
    yield "## Does the interference report foresee the loss?\n"
    yield "Spearman's rank correlation of each number with 1 − score, over all pairs of tasks, lossless: two adapters with a larger number lose more"
    yield "where it is positive. Pairs share tasks, so the interval (95 %) draws tasks, and p permutes them (Mantel), after Holm for all rows."
    clear = sum(one.verdict == PREDICTS for one in found)
    yield f"**{clear or 'None'} of {len(found)} {'foretells' if clear == 1 else 'foretell'} the loss.**\n"
    yield "| number | method | pairs | correlation | p | |\n|---|---|---|---|---|---|"
    for one in found:
        words = f"{one.correlation.value:+.2f} ({one.correlation.low:+.2f} to {one.correlation.high:+.2f})"
        yield f"| {one.number} | {one.method} | {one.pairs} | {words} | {one.p:.2g} | {one.verdict} |"
    yield ""


def _served(results: Path, run: dict[str, Any]) -> Iterator[str]:
    path = results / SERVED
    served = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    rows = [row for row in served if row["weights"] in run.get(WEIGHTS, {}).values()]
    if not rows:
        return
    yield "## Served through vLLM\n\nAccuracy, mean over the tasks, %: of the same recipe in a vLLM server on a CPU, and as recorded offline, on the same"
    yield "examples; the difference in points (95 % interval, paired); and on how many of the examples both are right or both are wrong.\n"
    yield "| recipe | offline | served | difference | within noise | agreement | examples |\n|---|---|---|---|---|---|---|"
    for row in rows:
        offline, served, agreement = (f"{100 * row[name]:.1f}" for name in ("offline", "served", "agreement"))
        difference = Interval(row["difference"], row["low"], row["high"]).in_words(sign=True)
        within = "yes" if row["within_noise"] else "**no**"
        yield f"| {row['recipe']} | {offline} | {served} | {difference} | {within} | {agreement} | {row['examples']} |"
    yield ""


def _images(images: Sequence[str], results: Path, page: Path) -> Iterator[str]:
    for name in images:
        place = os.path.relpath(results / name, page.parent)
        yield f"![{CAPTIONS[name]}]({place})\n\n{CAPTIONS[name]}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder with rows.jsonl and run.json")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page whose generated part is written")
    args = parser.parse_args()
    summary = write_report(args.results, args.page, TUNING if args.page == PAGE else None)
    print(
        f"{len(summary['families'])} merges in {args.page}"
        if summary["families"]
        else f"nothing measured yet; see {args.page}"
    )


if __name__ == "__main__":
    main()
