# SPDX-License-Identifier: Apache-2.0
"""Reports, from rows in a store to the sentence: what is true of the rows is said, in both kinds of database."""

import json
from dataclasses import replace

import numpy as np
import pytest

from tests.experiment_records import define, exposure, outcome
from vllm_merge.errors import MergeError, UserInputError
from vllm_merge.experiments.guardrails import breaches
from vllm_merge.experiments.measures import MEASURES
from vllm_merge.experiments.overview import overview
from vllm_merge.experiments.planning import baseline_like
from vllm_merge.experiments.readings import Readings
from vllm_merge.experiments.records import Decision
from vllm_merge.experiments.report import report
from vllm_merge.experiments.statistics.sums import Sums
from vllm_merge.experiments.store import Store

ARMS = ("a", "b")


def traffic(random, users: int, requests: int = 3):
    """Exposures of users that come several times, in arms by turns."""
    return [
        exposure(
            1000 * user + request,
            ARMS[user % 2],
            unit=f"user {user}",
            at=1_700_000_000.0 + 60 * user + request,
            completion_tokens=int(random.integers(10, 50)),
            first_token=float(random.lognormal(-2, 0.3)),
        )
        for user in range(users)
        for request in range(requests)
    ]


def scores(exposures, random, effect=0.0):
    return [
        outcome(
            i,
            float(random.random() + effect * (one.arm == "b")),
            exposure=one.id,
            arm=one.arm,
            unit=one.unit,
            at=one.at + 1,
        )
        for i, one in enumerate(exposures)
    ]


@pytest.fixture
def random():
    return np.random.default_rng(3)


def test_sums_over_units_are_those_of_the_rows(each_store, random):
    store = each_store
    exposures = traffic(random, 40)
    outcomes = scores(exposures, random)
    store.add_exposures(exposures)
    store.add_outcomes(outcomes)
    with store.reading() as connection:
        readings = Readings(connection, "ab", [1])
        length = readings.measures([MEASURES["length"]])["length"]
        scored, course = readings.outcome("score"), readings.course(7)
        by_step = readings.outcome("score", course)
    for arm in ARMS:
        users = sorted({one.unit for one in exposures if one.arm == arm})
        tokens = [sum(one.completion_tokens for one in exposures if one.unit == user) for user in users]
        values = [sum(one.value for one in outcomes if one.unit == user) for user in users]
        assert length[arm].values() == pytest.approx(Sums.of(tokens, 3.0).values())
        assert scored[arm].values() == pytest.approx(Sums.of(values, 3.0).values())
        assert by_step[arm].total().values() == pytest.approx(scored[arm].values())
        assert by_step[arm].units.shape == (7,)
        assert by_step[arm].units.min() > 0  # users came all the time


def test_a_better_arm_is_named(each_store, random):
    store = each_store
    define(store)
    exposures = traffic(random, 400)
    store.add_exposures(exposures)
    store.add_outcomes(scores(exposures, random, 0.2))
    facts = report(store, "ab")
    assert facts["verdict"]["advice"] == "promote"
    assert facts["verdict"]["arm"] == "b"
    assert facts["verdict"]["sentence"].startswith("b is better than a: score +0.")
    (found,) = facts["primary"]["differences"]
    assert found["low"] < 0.2 < found["high"]
    assert found["adjusted"] < 0.01
    assert facts["course"][0]["low"][-1] == pytest.approx(found["low"])
    assert facts["course"][0]["low"][0] is None  # too few units to say anything
    assert [arm["units"] for arm in facts["arms"]] == [200, 200]
    json.dumps(facts, allow_nan=False)


def test_a_worse_arm_is_not(store, random):
    define(store, primary={"metric": "score", "direction": "decrease"})
    exposures = traffic(random, 400)
    store.add_exposures(exposures)
    store.add_outcomes(scores(exposures, random, 0.2))
    verdict = report(store, "ab")["verdict"]
    assert (verdict["advice"], verdict["arm"]) == ("keep control", "a")
    assert verdict["sentence"].startswith("Keep a. b is worse: score +0.")


def test_no_difference_is_not_decided(store, random):
    define(store)
    exposures = traffic(random, 200)
    store.add_exposures(exposures)
    store.add_outcomes(scores(exposures, random))
    verdict = report(store, "ab")["verdict"]
    assert (verdict["advice"], verdict["arm"]) == ("wait", "")
    assert verdict["sentence"].startswith("Not decided yet. b − a: score ")


def test_it_is_too_early(store, random):
    define(store)
    assert "0 units" in report(store, "ab")["verdict"]["sentence"]
    exposures = traffic(random, 20)
    store.add_exposures(exposures)
    store.add_outcomes(scores(exposures, random))
    assert report(store, "ab")["verdict"]["sentence"] == (
        "Too early: score has come from 10 units of one arm; there is an interval from 50 on."
    )


def test_without_a_primary_metric_nothing_decides(store, random):
    define(store, primary=None)
    store.add_exposures(traffic(random, 20))
    facts = report(store, "ab")
    assert facts["verdict"]["advice"] == "nothing decides"
    assert (facts["primary"], facts["course"]) == (None, [])


def test_arms_without_their_units_are_not_read(store, random):
    define(store, arms={"a": 90, "b": 10})
    exposures = traffic(random, 400)
    store.add_exposures(exposures)
    store.add_outcomes(scores(exposures, random, 0.2))
    facts = report(store, "ab")
    assert facts["verdict"]["advice"] == "do not read"
    assert "200:200 units where their weights say 360:40" in facts["verdict"]["sentence"]
    store.decide(Decision("ab", 1, "stop", 1_600_000_000.0))  # before the first unit: afterwards nothing is expected
    assert not report(store, "ab")["imbalance"]["mismatch"]


def test_an_arm_that_broke_a_guardrail_is_not_promoted(store, random):
    define(store, guardrails=[{"metric": "length", "max": 5}])
    exposures = traffic(random, 400)
    store.add_exposures(exposures)
    store.add_outcomes(scores(exposures, random, 0.2))
    facts = report(store, "ab")
    assert [(check["arm"], check["state"]) for check in facts["guardrails"]] == [("b", "broken")]
    assert facts["verdict"]["sentence"] == "Keep a. b broke a guardrail."


def test_outcomes_join_without_their_exposures(each_store, random):
    """The ticket is enough where the exposure was lost; a unit alone needs one."""
    store = each_store
    define(store)
    exposures = traffic(random, 200, 1)
    kept, lost = exposures[:150], exposures[150:]
    store.add_exposures(kept)
    store.add_outcomes(scores(exposures, random))
    alone = [
        outcome(1000 + i, 1.0, exposure="", version=0, arm="", unit=one.unit, at=one.at + 9)
        for i, one in enumerate(kept[:4])
    ]
    nobody = [outcome(2000, 1.0, exposure="", version=0, arm="", unit="nobody")]
    forced = [outcome(3000, 99.0, counted=False)]
    other = [outcome(4000, 99.0, version=2), outcome(4001, 99.0, experiment="other")]
    store.add_outcomes([*alone, *nobody, *forced, *other])
    with store.reading() as connection:
        found = Readings(connection, "ab", [1]).outcome("score")
    assert sum(one.units for one in found.values()) == len(kept) + len(lost)
    assert sum(one.d for one in found.values()) == 204
    facts = report(store, "ab")
    assert facts["outcomes"]["score"] == {"count": 205, "lost": 1, "share": False}


def test_what_came_before_a_unit_is_its_past(each_store, random):
    store = each_store
    define(store)
    exposures = traffic(random, 400, 1)
    taste = {one.unit: float(random.normal(0, 1)) for one in exposures}
    store.add_exposures(exposures)
    before, after = [], []
    for i, one in enumerate(exposures):
        usual = {"exposure": "", "version": 0, "arm": "", "unit": one.unit}
        before.append(outcome(i, taste[one.unit], at=one.at - 3600, **usual))
        after.append(outcome(1000 + i, taste[one.unit] + float(random.normal(0, 0.5)), at=one.at + 60, **usual))
    store.add_outcomes(after)
    plain = report(store, "ab")["primary"]
    store.add_outcomes(before)
    found = report(store, "ab")["primary"]
    assert [value["units"] for value in found["values"]] == [200, 200]
    assert plain["variance_saved"] == 0
    assert found["variance_saved"] > 0.7

    def width(of):
        return of["differences"][0]["high"] - of["differences"][0]["low"]

    assert width(found) < 0.6 * width(plain)


def test_thumbs_are_shares_and_labels_are_told_apart(each_store, random):
    store = each_store
    define(store, primary={"metric": "ticket=solved"})
    exposures = traffic(random, 300, 1)
    store.add_exposures(exposures)
    said = []
    for i, one in enumerate(exposures):
        usual = {"exposure": one.id, "arm": one.arm, "unit": one.unit, "at": one.at + 1}
        said.append(outcome(i, float(i % 3 == 0), metric="thumb", **usual))
        said.append(outcome(1000 + i, 1.0, metric="ticket", label="solved" if i % 4 < 3 else "open", **usual))
    store.add_outcomes(said)
    facts = report(store, "ab")
    assert facts["primary"]["kind"] == "share"
    assert {value["arm"]: value["value"] for value in facts["primary"]["values"]} == {"a": 1.0, "b": 0.5}
    metrics = {metric["metric"]: metric for metric in facts["metrics"]}
    assert metrics["thumb"]["kind"] == "share"
    assert metrics["ticket=open"]["values"][1]["value"] == 0.5
    assert metrics["errors"]["values"][0]["value"] == 0


def test_a_ramp_goes_on_with_its_units_and_other_weights_begin_anew(store, random):
    define(store)
    first, later = traffic(random, 300)[:450], traffic(random, 300)[450:]
    store.add_exposures(first)
    store.add_outcomes(scores(first, random, 0.2))
    define(store, coverage=0.5, guardrails=[{"metric": "errors", "max": 0.5}])
    later = [replace(one, version=2) for one in [*later, *traffic(random, 2)]]  # two users of before come again
    later = [replace(one, id=f"{int(one.id, 16) + 10**9:032x}") for one in later]
    store.add_exposures(later)
    store.add_outcomes([replace(one, version=2, id=f"later {one.id}") for one in scores(later, random, 0.2)])
    facts = report(store, "ab")
    assert (facts["version"], facts["since_version"]) == (2, 1)
    assert [arm["units"] for arm in facts["arms"]] == [150, 150]
    assert sum(arm["requests"] for arm in facts["arms"]) == 906
    assert facts["outcomes"]["score"]["count"] == 906
    define(store, arms={"a": 90, "b": 10}, coverage=0.5)
    facts = report(store, "ab")
    assert (facts["version"], facts["since_version"]) == (3, 3)
    assert [arm["units"] for arm in facts["arms"]] == [0, 0]
    assert report(store, "ab", 2)["arms"][0]["units"] == 150


def test_the_state_of_an_experiment(store):
    define(store)
    assert [row["state"] for row in overview(store)] == ["running"]
    store.decide(Decision("ab", 1, "promote", 1.0, "b"))
    assert overview(store)[0]["state"] == "promoted b"
    store.decide(Decision("ab", 1, "stop", 2.0))
    assert report(store, "ab")["state"] == "stopped"
    define(store, start="2100-01-01T00:00:00Z")  # another version: what was decided is of the one before
    assert overview(store)[0] == {
        "experiment": "ab",
        "version": 2,
        "state": "not started",
        "arms": ["a", "b"],
        "primary": "score",
        "units": 0,
        "last": None,
    }
    define(store, end="2000-01-01T00:00:00Z")
    assert report(store, "ab")["state"] == "ended"
    assert report(store, "ab", 1)["state"] == "stopped"


def test_what_is_not_there_is_named(store):
    with pytest.raises(UserInputError) as none:
        report(store, "ab")
    assert str(none.value) == f"{store.place}: no experiment 'ab' (experiments: none)"
    define(store)
    with pytest.raises(UserInputError) as another:
        report(store, "abc")
    assert str(another.value) == f"{store.place}: no experiment 'abc', did you mean 'ab'? (experiments: ab)"
    with pytest.raises(UserInputError, match="experiment ab has no version 7"):
        report(store, "ab", 7)


def test_a_definition_of_another_version_is_said(store):
    store.define("ab", {"experiment": {"arms": {"a": {"serve": "a", "weight": 1.0}}, "colour": "red"}})
    with pytest.raises(MergeError, match="version 1 of its definition was written by another vllm-merge"):
        report(store, "ab")


def test_a_plan_takes_after_an_experiment(store, random):
    define(store)
    with pytest.raises(UserInputError, match="too little is known of score in a yet"):
        baseline_like(store, "ab")
    exposures = traffic(random, 400, 1)
    store.add_exposures(exposures)
    store.add_outcomes(scores(exposures, random))
    found = baseline_like(store, "ab")
    assert found.mean == pytest.approx(0.5, abs=0.06)
    assert found.deviation == pytest.approx(1 / np.sqrt(12), abs=0.03)
    define(store, primary=None)
    with pytest.raises(UserInputError, match="has no primary metric"):
        baseline_like(store, "ab")


GUARDRAILS = [
    ({"metric": "errors", "max": 0.1}, {"status": 500}),
    ({"metric": "errors", "max_increase": 0.5}, {"status": 500}),
    ({"metric": "refusals", "max": 0.1}, {"refused": True}),
    ({"metric": "length", "max": 100}, {"completion_tokens": 900}),
    ({"metric": "length", "max_increase": 0.2}, {"completion_tokens": 900}),
    ({"metric": "length", "max_decrease": 0.2}, {"completion_tokens": 2}),
    ({"metric": "first_token", "max_increase": 0.2}, {"first_token": 0.9}),
    ({"metric": "first_token", "quantile": 0.9, "max": 0.4}, {"first_token": 0.9}),
    ({"metric": "gap", "quantile": 0.5, "max_increase": 0.2}, {"gap_mean": 0.9}),
    ({"metric": "seconds", "quantile": 0.5, "max_decrease": 0.2}, {"seconds": 0.01}),
]


@pytest.mark.parametrize(("rail", "change"), GUARDRAILS)
def test_guardrails_see_what_breaks_them_and_nothing_else(store, random, rail, change):
    define(store, guardrails=[rail])
    definition = store.definition("ab")
    assert breaches(store, definition) == []
    good = traffic(random, 300, 1)
    store.add_exposures(good)
    assert breaches(store, definition) == []
    bad = [exposure(10_000 + i, ARMS[i % 2], **(change if i % 2 else {})) for i in range(600)]
    store.add_exposures(bad)
    (found,) = breaches(store, definition)
    assert found.arm == "b"
    assert found.guardrail.startswith(rail["metric"])
    assert found.reason.startswith(rail["metric"])
    assert "beyond the" in found.reason


def test_quantiles_and_means_in_postgres_too(postgres, random):
    store = Store.open(postgres)
    define(store, guardrails=[{"metric": "first_token", "quantile": 0.9, "max": 0.4}, {"metric": "errors", "max": 0.1}])
    store.add_exposures([exposure(i, ARMS[i % 2], first_token=0.9 if i % 2 else 0.1) for i in range(600)])
    store.add_exposures([exposure(i, ARMS[i % 2], status=500 if i % 2 else 200) for i in range(600, 1200)])
    found = breaches(store, store.definition("ab"))
    assert [(one.arm, one.guardrail) for one in found] == [("b", "first_token_p90"), ("b", "errors")]
    store.close()


def test_control_cannot_break_a_guardrail(store):
    define(store, guardrails=[{"metric": "errors", "max": 0.1}])
    store.add_exposures([exposure(i, ARMS[i % 2], status=200 if i % 2 else 500) for i in range(400)])
    assert breaches(store, store.definition("ab")) == []
