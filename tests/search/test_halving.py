# SPDX-License-Identifier: Apache-2.0
"""Successive halving with a played scorer: it finds the best within the budget, goes on from its log, and drops what fails."""

import json
import random
import threading

import pytest

from vllm_merge.errors import MergeError, UserInputError
from vllm_merge.search.budget import Budget, Ended
from vllm_merge.search.candidates import Candidate
from vllm_merge.search.halving import Halving
from vllm_merge.search.log import Log
from vllm_merge.search.rungs import Rung, cost, fit, plan_rungs

TASKS = ["a", "b"] * 60
RECIPE = {"merge_method": "ties", "space": "knots", "adapters": [{"adapter": "a"}], "parameters": {}}


def candidates(count):
    return [Candidate(number, {**RECIPE, "seed": number}) for number in range(count)]


class Played:
    """Candidate i gets an example right with the chance i / count; the same for every run."""

    shares = True
    tasks = TASKS

    def __init__(self, count, budget=None, failing=()):
        self.count, self.budget, self.failing = count, budget or Budget(), failing
        self.asked, self.lock = [], threading.Lock()

    def values(self, candidate, start, end):
        if candidate.number in self.failing:
            raise MergeError(f"/completions: 500: candidate {candidate.number} is broken")
        found = []
        for index in range(start, end):
            self.budget.take()
            with self.lock:
                self.asked.append((candidate.number, index))
            chance = random.Random(f"{candidate.number} {index}").random()
            found.append(float(chance < candidate.number / self.count))
        return found


def search(scorer, count=30, log=None, together=4, rungs=None):
    rungs = rungs or plan_rungs(count, len(TASKS), 2, 3)
    log = log or Log(None, {}, resume=False)
    return Halving(candidates(count), rungs, scorer, log, together=together, notify=lambda *_: None).run()


def test_rungs_halve_the_candidates_and_multiply_the_examples():
    rungs = plan_rungs(30, 256, 8, 3)
    assert rungs == [Rung(30, 16), Rung(10, 32), Rung(4, 88), Rung(2, 256)]
    assert cost(rungs) == 30 * 16 + 10 * 16 + 4 * 56 + 2 * 168
    assert plan_rungs(2, 10, 2, 3) == [Rung(2, 10)]
    assert plan_rungs(9, 3, 3, 3)[0] == Rung(9, 3), "a file may have less than two of a task"


def test_a_budget_takes_fewer_examples_and_says_when_it_is_too_small():
    for most in (600, 800, 1100):
        rungs = fit(30, 256, 8, 3, most)
        assert cost(rungs) <= most
        assert rungs[0].examples >= 16
    assert fit(30, 256, 8, 3, None) == fit(30, 256, 8, 3, 1200) == plan_rungs(30, 256, 8, 3)
    with pytest.raises(UserInputError, match="at most 12 --candidates"):
        fit(30, 256, 8, 3, 200)


def test_it_finds_the_best_with_a_fraction_of_the_answers():
    scorer = Played(30)
    found = search(scorer)
    assert found.best.number >= 27
    assert not found.ended
    assert len(scorer.asked) == len(set(scorer.asked)) == cost(plan_rungs(30, 120, 2, 3)), "nothing is asked twice"
    assert len(scorer.asked) < 30 * 120 / 3
    best = found.estimates[found.best.number].mean
    assert best.low < best.mean <= best.high
    assert best.count == 120
    assert max(found.rung.values()) == 4
    asked_first = {index for number, index in scorer.asked if number == 0}
    assert asked_first == {index for number, index in scorer.asked if number == 1}, "the same examples for all"


def test_it_finds_the_same_side_by_side_as_one_after_another():
    one, many = search(Played(30), together=1), search(Played(30), together=8)
    assert [c.number for c in one.ranking] == [c.number for c in many.ranking]


def test_what_fails_is_dropped_with_its_reason():
    found = search(Played(30, failing={29, 28, 3}))
    assert set(found.failures) == {29, 28, 3}
    assert "500: candidate 29 is broken" in found.failures[29]
    assert found.best.number in (25, 26, 27)
    assert not {29, 28, 3} & {candidate.number for candidate in found.ranking}


def test_one_that_fails_later_leaves_the_ranking():
    class Late(Played):
        def values(self, candidate, start, end):
            if candidate.number == 29 and start:
                raise MergeError("gone")
            return super().values(candidate, start, end)

    found = search(Late(30))
    assert found.failures == {29: "gone"}
    assert found.best.number != 29


def test_when_all_fail_there_is_no_best():
    found = search(Played(5, failing=set(range(5))), count=5)
    assert found.best is None
    assert len(found.failures) == 5


@pytest.mark.parametrize("requests", [150, 300, 500])
def test_a_spent_budget_keeps_the_best_so_far(requests):
    budget = Budget(requests=requests)
    scorer = Played(30, budget)
    found = search(scorer)
    assert found.ended == f"{requests} requests were made"
    assert len(scorer.asked) == budget.requests == requests
    assert found.best is not None
    best = max(found.rung.values())
    same = [c.number for c in found.ranking if found.rung[c.number] == best]
    means = [found.estimates[number].mean.mean for number in same]
    assert means == sorted(means, reverse=True)


def test_minutes_end_it_too():
    budget = Budget(minutes=1)
    budget._began -= 61
    found = search(Played(30, budget))
    assert (found.ended, found.best) == ("1 minutes are over", None)


def test_stopping_keeps_the_best_so_far_and_the_log_goes_on(tmp_path):
    path, identity = tmp_path / "log.jsonl", {"data": "x", "seed": 0}
    whole = search(Played(30))
    budget = Budget()
    stopping = Played(30, Budget(stopped=lambda: budget.requests > 0))
    taken = stopping.budget.take

    def take():
        if len(stopping.asked) > 400:
            budget.requests = 1
        taken()

    stopping.budget.take = take
    log = Log(path, identity, resume=False)
    log.add_candidates(candidates(30), {}, ["a note"])
    found = search(stopping, log=log)
    log.close()
    assert found.ended == "it was stopped"
    assert found.best is not None
    with path.open("a") as file:
        file.write('{"candidate": 3, "fro')  # cut off
    again = Log(path, identity, resume=True)
    assert [c.recipe for c in again.kept.candidates] == [c.recipe for c in candidates(30)]
    assert again.kept.notes == ["a note"]
    scorer = Played(30)
    resumed = search(scorer, log=again)
    again.close()
    assert [c.number for c in resumed.ranking] == [c.number for c in whole.ranking]
    assert resumed.estimates == whole.estimates
    kept = sum(len(values) for values in again.kept.values.values())
    assert len(scorer.asked) < cost(plan_rungs(30, 120, 2, 3))
    assert kept > 0
    asked = set(scorer.asked)
    for number, values in again.kept.values.items():
        assert not {(number, index) for index in range(len(values))} & asked, "what the log has is not asked again"
    for line in path.read_text().splitlines():
        json.loads(line)


def test_a_log_that_is_whole_asks_nothing_and_says_the_same(tmp_path):
    log = Log(tmp_path / "log", {}, resume=False)
    log.add_candidates(candidates(30), {}, [])
    first = search(Played(30, failing={5}), log=log)
    log.close()
    scorer = Played(30)
    again = search(scorer, log=Log(tmp_path / "log", {}, resume=True))
    assert not scorer.asked
    assert [c.number for c in again.ranking] == [c.number for c in first.ranking]
    assert again.failures == first.failures


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("nothing\n", ":1: is no line of a search's log"),
        ('{"search": 1, "identity": {"seed": 1}}\n', r"seed \(it was 1, now 0\)"),
        ('{"search": 1, "identity": {"seed": 0}}\n{"candidate": 1}\n', ":2: is no line"),
    ],
)
def test_logs_of_others_are_refused(tmp_path, text, message):
    (tmp_path / "log").write_text(text)
    with pytest.raises(UserInputError, match=message):
        Log(tmp_path / "log", {"seed": 0}, resume=True)
    assert (tmp_path / "log").read_text() == text


def test_an_earlier_log_is_not_written_over(tmp_path):
    (tmp_path / "log").write_text("x")
    with pytest.raises(UserInputError, match="--resume"):
        Log(tmp_path / "log", {}, resume=False)
    assert (tmp_path / "log").read_text() == "x"


def test_a_server_that_is_gone_ends_the_search():
    class Gone(Played):
        def values(self, candidate, start, end):
            raise UserInputError("--server: cannot be reached")

    with pytest.raises(UserInputError, match="cannot be reached"):
        search(Gone(30))


def test_ended_is_no_failure_of_a_candidate():
    class Over(Played):
        def values(self, candidate, start, end):
            raise Ended("over")

    found = search(Over(30))
    assert (found.failures, found.ended) == ({}, "over")
