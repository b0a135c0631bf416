# SPDX-License-Identifier: Apache-2.0
"""Scores, intervals, claims and the order of work of the quality benchmark, on rows that are made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.quality import claims, grid, records, report
from benchmarks.quality.scores import Family, Scores
from benchmarks.quality.settings import Settings
from vllm_merge import list_methods

TASKS = ("a", "b")
ROOT = Path(__file__).resolve().parents[2]


def bits(share: float, seed: int, count: int = 400) -> str:
    right = np.zeros(count, dtype=bool)
    right[np.random.default_rng(seed).permutation(count)[: round(share * count)]] = True
    return records.packed(right)


def rows(
    shares: dict[tuple[str, str, str], float], kind: str = "plain", seeds: tuple[int, ...] = (0, 1)
) -> list[records.Row]:
    """Adapters that are right on 90 %, chance 50 %; merges by (method, space, rank) with this accuracy on both tasks."""
    found: list[records.Row] = []
    for seed in seeds:
        common: dict[str, Any] = {"weights": f"{kind}{seed}", "set": kind, "seed": seed}
        found += [{"kind": "single", **common, "task": task, "chance": 0.5, "bits": bits(0.9, 7)} for task in TASKS]
        for place, ((method, space, rank), share) in enumerate(shares.items()):
            found.append(
                {
                    "kind": "merge",
                    **common,
                    "tasks": list(TASKS),
                    "method": method,
                    "space": space,
                    "rank": rank,
                    "stage": "all tasks",
                    "validation": share,
                    "merge_seconds": 0.1,
                    "bits": {task: bits(share, place + 10 * seed) for task in TASKS},
                    "report": {},
                }
            )
    return found


KNOTS = Family("plain", 2, "ties", "knots", "lossless")
DELTA = KNOTS.other(space="delta")


def test_packing() -> None:
    right = np.random.default_rng(0).random(1001) < 0.3
    assert np.array_equal(records.unpacked(records.packed(right)), right)


def test_score_and_interval() -> None:
    scores = Scores(rows({("ties", "knots", "lossless"): 0.7}), TASKS)
    found = scores.score(KNOTS)
    assert found.value == pytest.approx((0.7 - 0.5) / (0.9 - 0.5))
    spread = (0.7 * 0.3 / 400 / 2) ** 0.5 / 0.4  # of one seed; its own adapter's is less
    assert found.value - 5 * spread < found.low < found.value - spread
    assert found.value + spread < found.high < found.value + 5 * spread
    assert scores.by_task(KNOTS) == {task: pytest.approx(0.5) for task in TASKS}
    assert scores.accuracy(KNOTS) == pytest.approx(0.7)
    assert scores.score(KNOTS) == found


def test_a_task_that_nobody_learnt_is_no_measure() -> None:
    found = rows({("ties", "knots", "lossless"): 0.7})
    for row in found:
        if row["kind"] == "single" and row["task"] == "b":
            row["bits"] = bits(0.52, 3)
    assert set(Scores(found, TASKS).by_task(KNOTS)) == {"a"}


@pytest.mark.parametrize(
    ("knots", "delta", "verdict"), [(0.8, 0.6, "held"), (0.6, 0.8, "failed"), (0.7, 0.695, "undecided")]
)
def test_verdicts(knots: float, delta: float, verdict: str) -> None:
    made = rows({("ties", "knots", "lossless"): knots, ("ties", "delta", "lossless"): delta})
    found = {claim.text: claim for claim in claims.claims(Scores(made, TASKS), 16)}
    assert found["KnOTS-TIES is above TIES"].verdict == verdict
    assert f"{100 * (knots - delta) / 0.4:+.1f}" in found["KnOTS-TIES is above TIES"].found
    others = [claim for text, claim in found.items() if text != "KnOTS-TIES is above TIES"]
    assert {claim.verdict for claim in others} == {claims.UNMEASURED}


def test_differences_are_paired() -> None:
    """Two merges that are right on the same examples differ by nothing, however wide their own intervals."""
    made = rows({("ties", "knots", "lossless"): 0.7})
    twins = [{**row, "space": "delta"} for row in made if row["kind"] == "merge"]
    found = Scores([*made, *twins], TASKS).difference(KNOTS, DELTA)
    assert found is not None
    assert (found.value, found.low, found.high) == (0, 0, 0)
    assert Scores(made, TASKS).difference(KNOTS, DELTA) is None


def test_osrm_is_asked_of_every_method() -> None:
    names = [("task_arithmetic", "core", "lossless"), ("tsv_m", "core", "lossless")]
    plain = rows(dict.fromkeys(names, 0.6))
    for shares, verdict in (((0.8, 0.8), "held"), ((0.8, 0.5), "failed"), ((0.8, 0.6), "undecided")):
        lifted = rows(dict(zip(names, shares, strict=True)), "osrm")
        scores = Scores([*plain, *lifted], TASKS)
        found = {claim.text: claim for claim in (*claims.claims(scores, 16), *claims.goals(scores, 16))}
        assert found["OSRM lifts every method"].verdict == verdict
        gain = (sum(shares) / 2 - 0.6) / 0.4
        assert found["OSRM adapters give at least 5 points more"].verdict == ("held" if gain >= 0.05 else "failed")


def test_goals_go_by_what_is_best_on_validation() -> None:
    made = rows({("ties", "knots", "lossless"): 0.8, ("tsv_m", "core", "lossless"): 0.7, ("ctm", "core", "16"): 0.7})
    for row in made:
        if row.get("method") == "tsv_m":
            row["validation"] = 0.95
    goals = {claim.text: claim for claim in claims.goals(Scores(made, TASKS), 16)}
    best = goals["2 tasks: the best reaches 65 % lossless"]
    assert best.verdict == "failed"  # 75 % by ties, but it was not chosen
    assert "tsv_m" in best.found
    assert goals["2 tasks: the best reaches 60 % as one rank-16 adapter"].verdict == "failed"
    assert goals["four tasks: the best reaches 85 %"].verdict == claims.UNMEASURED


def test_the_report_as_a_predictor() -> None:
    made, rng = [], np.random.default_rng(0)
    for index in range(15):
        pair = [f"t{index}", f"u{index}"]
        share = 0.55 + 0.02 * index
        made += [
            {
                "kind": "single",
                "weights": "w",
                "set": "plain",
                "seed": 0,
                "task": task,
                "chance": 0.5,
                "bits": bits(0.95, 0),
            }
            for task in pair
        ]
        row = {
            "kind": "merge",
            "weights": "w",
            "set": "plain",
            "seed": 0,
            "tasks": pair,
            "stage": "pairs",
            "rank": "lossless",
        }
        numbers = {"cosine": 1 - share, "noise": float(rng.random()), "flat": 1.0}
        made.append(
            {
                **row,
                "method": "tsv_m",
                "space": "core",
                "bits": {task: bits(share, index) for task in pair},
                "report": numbers,
            }
        )
    found = {one.number: one for one in claims.predictors(Scores(made, TASKS))}
    assert set(found) == {"cosine", "noise"}
    assert (found["cosine"].verdict, found["noise"].verdict) == ("predicts", "does not")
    assert found["cosine"].correlation.value == pytest.approx(1)


def test_the_plan_covers_the_registry() -> None:
    tasks = tuple("abcdefgh")
    configs = grid.plan(Settings(), tasks)
    assert len({records.key(config.row()) for config in configs}) == len(configs)
    for kind in ("plain", "osrm", "mixed"):
        mine = [c for c in configs if c.set == kind and c.tasks == tasks and c.rank in ("lossless", 16)]
        for spec in list_methods():
            found = {(c.space, c.rank, c.seed) for c in mine if c.method == spec.name}
            spaces = grid.spaces(spec) if spec.most_adapters is None else ()
            assert found == {(space, rank, seed) for space in spaces for rank in ("lossless", 16) for seed in (0, 1, 2)}
    assert {len(config.tasks) for config in configs} == {2, 4, 8}
    assert {c.method for c in configs if len(c.tasks) == 2} == {spec.name for spec in list_methods()}
    stages = list(dict.fromkeys(config.stage for config in configs))
    assert stages[:3] == ["all tasks", "osrm", "mixed"]
    assert [config.seed for config in configs[:1]] == [0]
    assert grid.groups("abcdefgh", 4) == [tuple("abcd"), tuple("efgh")]
    assert grid.groups("abc", 2) == [tuple("ab")]


def test_the_estimate_goes_by_what_was_measured() -> None:
    configs = grid.plan(Settings(), tuple("abcdefgh"), ["tsv_m"], ["all tasks"])
    assert grid.estimate(configs, [], "cuda", 1) == pytest.approx(grid.SECONDS["cuda"] * len(configs))
    timed = [{"kind": "merge", "wall": 4.0, "tasks": list("abcd")}]
    assert grid.estimate(configs, timed, "cuda", 2) == pytest.approx(8 * len(configs) / 2)


def test_nothing_is_said_of_what_was_not_measured(tmp_path: Path) -> None:
    report.write_report(tmp_path, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert text.count("Not measured yet.") == 2
    assert not any(word in text for word in ("held**", "failed**", "| "))
    assert not (tmp_path / "summary.json").exists()


def test_the_page_says_what_is_recorded() -> None:
    page = report.PAGE.read_text(encoding="utf-8")
    summary = report.RESULTS / "summary.json"
    if not summary.is_file():
        assert page.count("Not measured yet.") == 2
        return
    found = json.loads(summary.read_text(encoding="utf-8"))
    for claim in found["claims"]:
        assert f"| {claim['text']} | {claim['source']} | **{claim['verdict']}** | {claim['found']} |" in page
