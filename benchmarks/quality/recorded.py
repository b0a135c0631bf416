# SPDX-License-Identifier: Apache-2.0
"""What a folder of results says: its rows arranged, and all that is worked out from them. Two such folders are kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.quality.claims import Claim, claims, goals
from benchmarks.quality.learning import Learned, learned_goals, learned_runs, with_learned
from benchmarks.quality.predictors import Predictor, predictors
from benchmarks.quality.records import Row, read_rows, read_run
from benchmarks.quality.scores import Family, Scores
from benchmarks.quality.settings import Settings

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Edition:
    """A set of results that is kept, and its page. name: how the tasks are asked in it."""

    name: str
    results: Path
    page: Path


OWN_EDITION, SAME_EDITION = (
    Edition("own words", ROOT / "benchmarks" / "results" / "quality", ROOT / "docs" / "evidence.md"),
    Edition(
        "the same words",
        ROOT / "benchmarks" / "results" / "quality-same-words",
        ROOT / "docs" / "evidence-same-words.md",
    ),
)


@dataclass(frozen=True)
class Recorded:
    """A folder of results. scores: of merges that learn nothing; every: with those that do."""

    results: Path
    run: Mapping[str, Any]
    rows: Sequence[Row]
    rank: int | str
    scores: Scores
    every: Scores
    learned: Sequence[Learned]
    claims: Sequence[Claim]
    goals: Sequence[Claim]
    predictors: Sequence[Predictor]

    @classmethod
    def of(cls, results: Path) -> Recorded:
        run, rows = read_run(results), read_rows(results)
        tasks: Sequence[str] = run.get("gate", {}).get("counted", [])
        rank, gate = (run["settings"]["ranks"][0], run["settings"]["gate"]) if run else (16, Settings.gate)
        scores, every = Scores(rows, tasks, gate), with_learned(rows, tasks, gate)
        learned = learned_runs(every, rows)
        own = [*goals(scores, rank), *learned_goals(every, learned, rank)]
        return cls(results, run, rows, rank, scores, every, learned, claims(scores, rank), own, predictors(scores))

    @property
    def device(self) -> str:
        """That of rows which name none."""
        return str(self.run.get("device", ""))

    def summary(self) -> dict[str, Any]:
        """As summary.json has it."""
        return {
            "run": {name: part for name, part in self.run.items() if name != "settings"},
            "left_out": [asdict(one) for one in self.scores.left_out],
            "families": [_entry(self.every, family) for family in sorted(self.every.families)],
            "claims": [asdict(claim) for claim in (*self.claims, *self.goals)],
            "learned": [asdict(one) for one in self.learned],
            "predictors": [asdict(predictor) for predictor in self.predictors],
            "lambdas_at_an_end": sum(row["at_edge"] for row in self.scores.merges if "at_edge" in row),
            "refused": sorted({f"{row['method']} {row['space']}: {row['error']}" for row in self.scores.errors}),
        }


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
