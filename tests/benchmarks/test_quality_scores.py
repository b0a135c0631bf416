# SPDX-License-Identifier: Apache-2.0
"""Scores, intervals, claims and the order of work of the quality benchmark, on rows that are made up."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks.quality import claims, grid, records, served
from benchmarks.quality.learning import Learned, learned_goals, with_learned
from benchmarks.quality.predictors import Predictor, _corrected, predictors
from benchmarks.quality.run import Places, record_call
from benchmarks.quality.scores import Interval, Scores
from benchmarks.quality.settings import Settings
from benchmarks.quality.tasks import Example, Task, Words
from tests.benchmarks.quality_rows import DELTA, KNOTS, TASKS, bits, paired, rows
from vllm_merge import list_methods


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


def relearnt(found: list[records.Row], task: str, share: float, **fields: Any) -> list[records.Row]:
    """The rows, with the accuracy of some adapters on their own task changed."""
    those = lambda row: row["kind"] == "single" and row["task"] == task and fields.items() <= row.items()
    return [{**row, "bits": bits(share, 3)} if those(row) else row for row in found]


def test_a_task_that_was_not_learnt_is_no_measure() -> None:
    """At the gate an adapter counts, right under it no longer: what the merge gets right there changes nothing."""
    made = rows({("ties", "knots", "lossless"): 0.7})
    at_gate, under = (Scores(relearnt(made, "b", share), TASKS, gate=0.2) for share in (0.7, 0.6975))
    assert at_gate.by_task(KNOTS) == {"a": pytest.approx(0.5), "b": pytest.approx(1)}
    assert at_gate.left_out == []
    assert under.by_task(KNOTS) == {"a": pytest.approx(0.5)}
    assert under.score(KNOTS).value == pytest.approx(0.5)
    assert [(one.set, one.seed, one.task) for one in under.left_out] == [("plain", 0, "b"), ("plain", 1, "b")]
    assert under.left_out[0].above == pytest.approx(0.1975)
    assert Scores(relearnt(made, "b", 0.6975), TASKS, gate=0.1).score(KNOTS).value > 0.7
    nothing = Scores(relearnt(relearnt(made, "a", 0.5), "b", 0.5), TASKS)
    assert nothing.families == {}
    assert len(nothing.left_out) == 4


def test_sets_are_compared_on_the_tasks_that_both_learnt() -> None:
    """An adapter of one set and seed that failed takes its task out of both sides, at that seed only."""
    mine = {("ties", "knots", "lossless"): 0.8}
    plain, lifted = rows(mine), rows(mine, "osrm")
    for row in lifted:
        if row["kind"] == "merge":
            row["bits"] = {"a": bits(0.8, 0), "b": bits(0.6, 0)}
    made = [*plain, *relearnt(lifted, "b", 0.55, seed=1)]
    scores, osrm = Scores(made, TASKS), KNOTS.other(set="osrm")
    gain = scores.difference(osrm, KNOTS)
    assert gain is not None
    assert gain.value == pytest.approx(((0 + (0.6 - 0.8) / 0.4) / 2 + 0) / 2)  # both tasks at seed 0, one at seed 1
    own = scores.score(osrm, beside=KNOTS).value - scores.score(KNOTS, beside=osrm).value
    assert gain.value == pytest.approx(own)
    assert scores.score(KNOTS, [1], beside=osrm).value == pytest.approx(0.75)
    neither = Scores([*relearnt(plain, "a", 0.5), *relearnt(lifted, "b", 0.5)], TASKS)
    assert neither.difference(osrm, KNOTS) is None


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
    assert best.found.startswith("50.0 (")
    assert best.found.endswith(", ties in knots")
    assert ", tsv_m in core; best on the tests, which choose nothing: 75.0 (" in best.found
    assert "tests" not in goals["2 tasks: the best reaches 60 % as one rank-16 adapter"].found
    assert goals["2 tasks: the best reaches 60 % as one rank-16 adapter"].verdict == "failed"
    assert goals["four tasks: the best reaches 85 %"].verdict == claims.UNMEASURED


def test_the_report_as_a_predictor() -> None:
    made = paired("abcdefg")
    found = {one.number: one for one in predictors(Scores(made, "abcdefg"))}
    assert set(found) == {"cosine", "noise"}
    assert (found["cosine"].verdict, found["noise"].verdict) == ("predicts", "does not")
    assert found["cosine"].correlation.value == pytest.approx(1)
    assert found["cosine"].p < 0.01 < found["noise"].p
    assert found["noise"].correlation.low < found["noise"].correlation.value < found["noise"].correlation.high
    assert predictors(Scores(made[:-1], "abcdefg")) == []  # a pair is missing
    assert predictors(Scores(paired("abcd"), "abcd")) == []  # too few


def test_many_numbers_are_corrected_for() -> None:
    """One of many that is a little sure by itself is not sure among the others."""
    one = Predictor("x", "m", 28, Interval(0.5, 0.1, 0.8), 0.02)
    assert [found.verdict for found in _corrected([one])] == ["predicts"]
    found = _corrected([one, *(replace(one, p=0.5) for _ in range(9))])
    assert {other.verdict for other in found} == {"does not"}
    assert found[0].p == pytest.approx(0.2)
    assert _corrected([replace(one, correlation=Interval(0.2, 0.1, 0.3))])[0].verdict == "does not"


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


class Chain:
    """A tokenizer of words, and a client whose model looks at the last token alone; it tells the TOP likeliest."""

    WORDS = ("<end>", "yes", "no", "maybe", "so", "not", *(f"w{index}" for index in range(60)))
    eos_token_id = 0

    def __init__(self) -> None:
        logits = np.random.default_rng(0).normal(size=(len(self.WORDS), len(self.WORDS)))
        logits[:, 0] += 8  # a label that began ends soon
        self.log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        self.log_p[:, 3] -= 9  # never among those that are told
        self.completions, self.whole = self, 0

    def __call__(self, text: Any) -> dict[str, Any]:
        ids = lambda one: [self.WORDS.index(word) for word in one.split() if word in self.WORDS]
        return {"input_ids": ids(text) if isinstance(text, str) else [ids(one) for one in text]}

    def create(self, *, prompt: list[list[int]], logprobs: int, **options: Any) -> Any:
        self.whole += len(prompt) if options.get("echo") else 0
        choices = []
        for index, ids in enumerate(prompt):
            own = [None, *(float(self.log_p[a, b]) for a, b in pairwise(ids)), -1.0]
            likeliest = np.argsort(-self.log_p[ids[-1]])[:logprobs]
            top = {f"token_id:{token}": float(self.log_p[ids[-1], token]) for token in likeliest}
            told = SimpleNamespace(token_logprobs=own, top_logprobs=[top])
            choices.append(SimpleNamespace(index=index, logprobs=told))
        return SimpleNamespace(choices=choices[::-1])


def test_the_likeliest_label_is_found_without_reading_all() -> None:
    chain = Chain()
    labels = ("yes", "yes so", "no", "no not so", "maybe", *(f"w{index}" for index in range(12)))
    examples = [Example(f"w{index}", index % len(labels)) for index in range(60)]
    task = Task("made up", Words(), labels, (), (), examples)
    ends = [[*chain(label)["input_ids"], 0] for label in labels]
    totals = [[sum(chain.log_p[a, b] for a, b in pairwise([6 + i, *end])) for end in ends] for i in range(60)]
    expected = np.argmax(totals, axis=1) == [example.label for example in examples]
    assert np.array_equal(served.right_answers(chain, chain, "x", task, 60), expected)
    assert 0 < expected.sum() < 60
    assert chain.whole < 0.5 * 60 * len(labels)


@pytest.mark.parametrize(
    ("gains", "verdict"),
    [([0.05, 0.06], "held"), ([0.05, 0.01], "undecided"), ([0.05, -0.05], "failed"), ([], "not measured yet")],
)
def test_the_goal_of_learners_goes_by_intervals(gains: list[float], verdict: str) -> None:
    made = rows({("tsv_m", "core", "lossless"): 0.7})
    merges = [row for row in made if row["kind"] == "merge"][: len(gains)]
    extra = [
        {**merges[0], "kind": "learned", "method": f"m{index}", "seconds": 1.0, "labels": False}
        for index in range(len(gains))
    ]
    every = with_learned([*made, *extra], TASKS, 0.2)
    score = Interval(0.6, 0.5, 0.7)
    learned = [
        Learned(
            f"m{index}", "lossless", False, score, Interval(gain, gain - 0.02, gain + 0.02), "tsv_m in core", 1, 1, 1
        )
        for index, gain in enumerate(gains)
    ]
    *_, claim = learned_goals(every, learned, 16)
    assert claim.verdict == verdict


def test_few_methods_and_seeds_are_said() -> None:
    """A verdict by fewer seeds than were trained says by how many; of a goal, by how many methods."""
    both = {("ties", "knots", "lossless"): 0.7, ("ties", "delta", "lossless"): 0.6}
    made = [row for row in rows(both) if row["kind"] == "single" or row["seed"] == 0]
    scores = Scores(made, TASKS)
    assert next(iter(claims.claims(scores, 16))).found.endswith("; 50.0 against 25.0; 1 seed")
    assert "ties in knots; 2 methods measured, at 1 seed" in next(iter(claims.goals(scores, 16))).found
    whole = Scores(rows(both), TASKS)
    assert next(iter(claims.claims(whole, 16))).found.endswith("; 50.0 against 25.0")
    assert "measured" not in next(iter(claims.goals(whole, 16))).found


def test_osrm_at_a_rank_stands_beside(tmp_path: Path) -> None:
    """The verdict is of lossless merges alone."""
    plain = rows({("tsv_m", "core", "lossless"): 0.7, ("tsv_m", "core", "16"): 0.7})
    lifted = rows({("tsv_m", "core", "lossless"): 0.8, ("tsv_m", "core", "16"): 0.6}, "osrm")
    scores = Scores([*plain, *lifted], TASKS)
    found = {claim.text: claim for claim in (*claims.claims(scores, 16), *claims.goals(scores, 16))}
    every, goal = found["OSRM lifts every method"], found["OSRM adapters give at least 5 points more"]
    assert (every.verdict, goal.verdict) == ("held", "held")
    assert "; at rank 16 0 of 1 lifted, 1 lowered (tsv_m core), from -25.0 (tsv_m core)" in every.found
    assert "the mean of 1 methods, lossless; at rank 16 -25.0 (" in goal.found


def test_a_call_records_what_it_did(tmp_path: Path) -> None:
    places = Places(Settings(), tmp_path, tmp_path, tmp_path, "cpu")
    record_call(places, "merges", time.monotonic() - 90, 3, 7, ["plain"])
    record_call(places, "learners", time.monotonic(), 2, 0)
    first, second = records.read_run(tmp_path)["calls"]
    assert (first["what"], first["jobs"], first["count"], first["trained"]) == ("merges", 3, 7, ["plain"])
    assert first["minutes"] >= 1.5
    assert first["devices"] == 1
    assert first["device"].startswith("CPU (")
    assert (second["what"], second["count"], second["trained"]) == ("learners", 0, [])
