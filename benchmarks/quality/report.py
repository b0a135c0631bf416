# SPDX-License-Identifier: Apache-2.0
"""Tables, plots and the generated part of docs/evidence.md, from what is recorded; half a minute on a CPU, no model.

python -m benchmarks.quality.report [--results DIR] [--page FILE]
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.quality.claims import UNMEASURED, Claim, Predictor, claims, goals, predictors
from benchmarks.quality.grid import FIRST, LOSSLESS
from benchmarks.quality.learning import learned_goals, learned_table, with_learned
from benchmarks.quality.plots import write_plots
from benchmarks.quality.records import read_rows, read_run
from benchmarks.quality.scores import Family, Scores, adapters
from benchmarks.quality.served import SERVED

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "quality"
PAGE = ROOT / "docs" / "evidence.md"
BEGIN, END = "<!-- generated: make evidence -->", "<!-- end of generated -->"
CAPTIONS = {
    "seconds.png": "Score against the seconds of the merge.",
    "ranks.png": "Score against the rank of the result.",
    "norms.png": "DO-Merging over task arithmetic, against how unequal two adapters are.",
    "osrm.png": "Each method with plain adapters, and with adapters that started from OSRM.",
    "tasks.png": "Score of every task under every method.",
}


def write_report(results: Path, page: Path) -> dict[str, Any]:
    """Write summary.json and the plots to the results, and the generated part of the page; the summary."""
    run, rows = read_run(results), read_rows(results)
    tasks: Sequence[str] = run.get("gate", {}).get("counted", [])
    scores = Scores(rows, tasks)
    rank = run["settings"]["ranks"][0] if run else 16
    every = with_learned(rows, tasks)
    found, own = claims(scores, rank), [*goals(scores, rank), *learned_goals(every, rank)]
    predicting = predictors(scores)
    summary = {
        "run": {name: part for name, part in run.items() if name != "settings"},
        "families": [_entry(every, family) for family in sorted(every.families)],
        "claims": [asdict(claim) for claim in (*found, *own)],
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
            *_tables(scores, rank),
            *learned_table(every, rows),
            *_joint(scores),
            *_predictors(predicting),
            *_served(results),
        ]
        parts += _images(images, results, page)
    block = "\n".join(parts)
    before = page.read_text(encoding="utf-8") if page.is_file() else f"# Evidence\n\n{BEGIN}\n{END}\n"
    page.write_text(renewed(before, block), encoding="utf-8")
    return summary


def renewed(page: str, block: str) -> str:
    """The page with another block between its markers."""
    start, _, rest = page.partition(BEGIN)
    return f"{start}{BEGIN}\n\n{block}\n\n{END}{rest.partition(END)[2]}"


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
    minutes = sum(call["minutes"] for call in run.get("calls", []))
    yield f"## Tasks and adapters\n\nOn {run['device']}, {minutes:.0f} minutes in all; accuracy on the tests, %.\n"
    kinds = adapters(scores)
    yield "| task | chance | base, few-shot | " + " | ".join(f"{kind} adapter" for kind in kinds) + " | counts |"
    yield "|---|---|---|" + "---|" * (len(kinds) + 1)
    for task, row in run["gate"]["tasks"].items():
        own = [f"{100 * kinds[kind][task]:.1f}" if task in kinds[kind] else "" for kind in kinds]
        if task not in scores.tasks:
            own[list(kinds).index("plain")] = f"{100 * row['single']:.1f}"
        counts = "yes" if task in scores.tasks else "no" if not row["counts"] else "spare"
        yield f"| {task} | {100 * row['chance']:.1f} | {100 * row['base']:.1f} | {' | '.join(own)} | {counts} |"
    yield ""


def _tables(scores: Scores, rank: int | str) -> Iterator[str]:
    sizes = sorted({family.size for family in scores.families}, reverse=True)
    for kind, size in [(kind, size) for kind in ("plain", "osrm", "osrm-mean", "mixed") for size in sizes]:
        those = {(f.method, f.space) for f in scores.families if (f.set, f.size) == (kind, size)}
        if not those:
            continue
        yield f"## {kind.capitalize()} adapters, {size} tasks\n\nScore, % (95 % interval); the seeds and seconds of the merge.\n"
        yield f"| method | space | lossless | rank {rank} | seeds | seconds |\n|---|---|---|---|---|---|"
        lines = []
        for method, space in those:
            found = {r: Family(kind, size, method, space, r) for r in (LOSSLESS, str(rank))}
            there = {r: family for r, family in found.items() if family in scores.families}
            cells = [scores.score(there[r]).in_words() if r in there else "" for r in found]
            if not there:
                continue
            order = max(scores.score(family).value for family in there.values())
            seeds = max(len(scores.families[family]) for family in there.values())
            seconds = scores.seconds(next(iter(there.values())))
            bold = "**" if (method, space) in FIRST else ""
            lines.append(
                (-order, f"| {bold}{method}{bold} | {space} | {' | '.join(cells)} | {seeds} | {seconds:.2g} |")
            )
        yield from (line for _, line in sorted(lines))
        yield ""


def _joint(scores: Scores) -> Iterator[str]:
    """Hits@k when the label is chosen among those of all tasks."""
    rows = [row for row in scores.merges if "hits" in row and row["rank"] == LOSSLESS]
    if not rows:
        return
    yield "## One label set for all tasks\n\nThe joint setting of KnOTS, on the first tests of each task: hits@1, @3, @5, %, the mean over tasks and seeds.\n"
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
    yield "Spearman's rank correlation of each number with 1 − score, over all pairs of tasks (95 % interval). "
    yield "Two adapters with a larger number lose more where it is positive.\n"
    yield "| number | method | pairs | correlation | |\n|---|---|---|---|---|"
    for one in found:
        words = f"{one.correlation.value:+.2f} ({one.correlation.low:+.2f} to {one.correlation.high:+.2f})"
        yield f"| {one.number} | {one.method} | {one.pairs} | {words} | {one.verdict} |"
    yield ""


def _served(results: Path) -> Iterator[str]:
    path = results / SERVED
    if not path.is_file():
        return
    yield "## Served through vLLM\n\nAccuracy, mean over the tasks, %: as recorded offline, and of the same recipe in a vLLM server; and on"
    yield "how many of the examples both are right or both are wrong.\n"
    yield "| recipe | offline | served | within noise | agreement | examples |\n|---|---|---|---|---|---|"
    rows = json.loads(path.read_text(encoding="utf-8"))
    for row in rows:
        numbers = [f"{100 * row[name]:.1f}" for name in ("offline", "served", "agreement")]
        within = "yes" if row["within_noise"] else "**no**"
        yield f"| {row['recipe']} | {numbers[0]} | {numbers[1]} | {within} | {numbers[2]} | {row['examples']} |"
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
    summary = write_report(args.results, args.page)
    print(
        f"{len(summary['families'])} merges in {args.page}"
        if summary["families"]
        else f"nothing measured yet; see {args.page}"
    )


if __name__ == "__main__":
    main()
