# SPDX-License-Identifier: Apache-2.0
"""Who gets which arm. Numbers that are GrowthBook's are those of its SDKs' cases.json, specification 0.7.1."""

import json
from collections import Counter
from itertools import pairwise

import pytest

from vllm_merge.experiments.assignment import Assigner, Unit, Withdrawn, find_unit
from vllm_merge.experiments.hashing import MAX_UNIT, bucket, fnv1a32, namespace_place, unit_hash
from vllm_merge.experiments.ranges import first_ranges, next_ranges
from vllm_merge.experiments.running import Running, follow
from vllm_merge.recipe.experiments import Experiment

UNITS = [f"user-{i}" for i in range(20_000)]


def running(name="e", before=None, **keys) -> Running:
    keys.setdefault("arms", {"a": 1, "b": 1})
    return follow(name, Experiment.model_validate(keys), {}, before)


def arms_of(setup, units=UNITS, now=1.0, **more):
    assigner = Assigner(setup)
    return [assigner.assign(unit, now, **more) for unit in units]


# -- GrowthBook's published cases ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seed", "value", "expected"),
    [
        ("seed", "a", 0.0505),
        ("seed", "b", 0.2696),
        ("foo", "ab", 0.2575),
        ("foo", "def", 0.2019),
        ("89123klj", "8952klfjas09ujkasdf", 0.124),
        ("90850943850283058242805", "123", 0.7516),
        ("()**(%$##$%#$#", '___)((*":&', 0.0128),
    ],
)
def test_the_hash_is_growthbook_s_version_2(seed, value, expected):
    assert bucket(seed, value) == expected


@pytest.mark.parametrize(
    ("value", "namespace", "inside"),
    [(user, space, (user, space) in {("3", 2), ("4", 2)}) for user in "1234" for space in (1, 2)],
)
def test_namespaces_are_growthbook_s(value, namespace, inside):
    assert (namespace_place(f"namespace{namespace}", value) < 0.4) is inside


@pytest.mark.parametrize(
    ("weights", "coverage", "expected"),
    [
        ((0.5, 0.5), 1, ((0, 0.5), (0.5, 1))),
        ((0.5, 0.5), 0.5, ((0, 0.25), (0.5, 0.75))),
        ((0.5, 0.5), 0, ((0, 0), (0.5, 0.5))),
        ((0.25,) * 4, 1, ((0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1))),
        ((0.4, 0.6), 1, ((0, 0.4), (0.4, 1))),
        ((0.2, 0.3, 0.5), 1, ((0, 0.2), (0.2, 0.5), (0.5, 1))),
        ((0.2, 0.3, 0.5), 0.2, ((0, 0.04), (0.2, 0.26), (0.5, 0.6))),
    ],
)
def test_the_first_ranges_are_growthbook_s(weights, coverage, expected):
    ranges = first_ranges({str(i): weight for i, weight in enumerate(weights)}, coverage)
    for found, wanted in zip(ranges.values(), expected, strict=True):
        assert found == (pytest.approx(wanted),)


@pytest.mark.parametrize(
    ("place", "arms", "coverage", "expected"),
    [
        (0.2, (1, 1), 1, "0"),
        (0.4, (1, 1), 1, "0"),
        (0.6, (1, 1), 1, "1"),
        (0, (1, 1), 1, "0"),
        (0.5, (1, 1), 1, "1"),
        (0.4, (1, 1), 0.5, None),
        (0.6, (1, 1), 0.5, "1"),
        (0.8, (1, 1), 0.5, None),
        (0.25, (1, 1), 0.5, None),
        (0.5, (1, 0, 1), 1, "2"),
    ],
)
def test_a_place_belongs_to_the_arm_that_growthbook_chooses(place, arms, coverage, expected):
    setup = running(arms={str(i): weight for i, weight in enumerate(arms)}, coverage=coverage)
    assert Assigner(setup).arm_at(place) == expected


def test_fnv1a_takes_utf_16_as_javascript_does():
    assert fnv1a32("") == 0x811C9DC5
    assert fnv1a32("a") == 0xE40C292C  # of the reference implementation
    assert fnv1a32("é") == ((0x811C9DC5 ^ 0xE9) * 0x01000193) & 0xFFFFFFFF
    by_hand = 0x811C9DC5
    for unit in (0xD83D, 0xDE00):
        by_hand = ((by_hand ^ unit) * 0x01000193) & 0xFFFFFFFF
    assert fnv1a32("\U0001f600") == by_hand


# -- changes move few units ----------------------------------------------------------------------------------------------

CHANGES = [
    ({"a": 1, "b": 1}, 1.0, {"a": 3, "b": 2}, 1.0),
    ({"a": 1, "b": 1}, 0.1, {"a": 1, "b": 1}, 0.6),
    ({"a": 1, "b": 1}, 0.6, {"a": 1, "b": 1}, 0.1),
    ({"a": 1, "b": 1, "c": 1}, 1.0, {"a": 2, "b": 1, "c": 1}, 1.0),
    ({"a": 2, "b": 1, "c": 1}, 1.0, {"a": 1, "b": 2, "c": 1}, 1.0),
    ({"a": 5, "b": 1, "c": 1, "d": 1}, 0.5, {"a": 1, "b": 1, "c": 1, "d": 5}, 0.8),
    ({"a": 1, "b": 1, "c": 1}, 1.0, {"a": 1, "b": 1}, 1.0),
    ({"a": 1, "b": 1}, 1.0, {"a": 1, "b": 1, "new": 1}, 1.0),
    ({"a": 1, "b": 1, "c": 1}, 1.0, {"a": 1, "b": 0, "c": 1}, 1.0),
    ({"a": 1, "b": 1}, 0.5, {"a": 1, "b": 9}, 0.25),
]


@pytest.mark.parametrize(("weights", "coverage", "later", "cover_later"), CHANGES)
def test_a_change_moves_the_theoretical_minimum(weights, coverage, later, cover_later):
    """The least that any assignment of these sizes can move is what the shrinking arms lose."""
    first = running(arms=weights, coverage=coverage)
    second = running(before=first, arms=later, coverage=cover_later)
    assert second.version == 2
    places = [i / 10_000 for i in range(10_000)]
    before, after = Assigner(first), Assigner(second)
    pairs = [(before.arm_at(place), after.arm_at(place)) for place in places]
    have, get = Counter(a for a, _ in pairs), Counter(b for _, b in pairs)
    least = sum(max(0, have[arm] - get[arm]) for arm in weights)
    assert sum(1 for a, b in pairs if a is not None and a != b) == least
    total = sum(later.values())
    for arm, weight in later.items():
        assert get[arm] == pytest.approx(10_000 * cover_later * weight / total, abs=1)


def test_shifting_the_boundaries_alone_would_move_more():
    """The counter-example that the above exists for: what GrowthBook's ranges alone would do."""
    before, after = {"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}, {"a": 0.5, "b": 0.25, "c": 0.25}
    plain, kept = first_ranges(after, 1.0), next_ranges(first_ranges(before, 1.0), after, 1.0)
    assert plain["b"] != kept["b"]
    assert plain["b"][0][1] - plain["b"][0][0] == pytest.approx(sum(end - start for start, end in kept["b"]), abs=2e-4)


def test_many_changes_keep_sizes_and_never_overlap():
    setup = running(arms={"a": 1, "b": 1, "c": 1, "d": 1})
    for step in range(1, 12):
        arms = {"a": 1 + step % 3, "b": 1 + step % 5, "c": 1 + step % 2, "d": 1 + step % 7}
        setup = running(before=setup, arms=arms, coverage=1 - step % 4 / 10)
        edges = sorted(interval for found in setup.ranges.values() for interval in found)
        assert all(one[1] <= other[0] for one, other in pairwise(edges))
        for arm, share in setup.experiment.weights.items():
            size = sum(end - start for start, end in setup.ranges[arm])
            assert size == pytest.approx(share * setup.experiment.coverage, abs=2e-4)


def test_what_has_not_changed_is_the_same_version_and_another_seed_draws_anew():
    first = running()
    assert running(before=first) is first
    assert running(before=first, primary={"metric": "score"}).ranges == first.ranges
    later = running(before=running(before=first, arms={"a": 3, "b": 1}), arms={"a": 3, "b": 1}, seed="again")
    assert later.ranges == first_ranges({"a": 0.75, "b": 0.25}, 1.0)


# -- units ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("declared", "headers", "body", "expected"),
    [
        ({"header": "x-user"}, {"x-user": "h"}, {"user": "u"}, ("header", "h")),
        ({"header": "x-user"}, {}, {"user": "u", "prompt_cache_key": "p"}, ("user", "u")),
        ("safety_identifier", {}, {"user": "u", "safety_identifier": "s"}, ("safety_identifier", "s")),
        ("safety_identifier", {}, {"user": "u", "prompt_cache_key": "p"}, ("user", "u")),
        ("prompt_cache_key", {}, {"user": "u", "prompt_cache_key": "p"}, ("prompt_cache_key", "p")),
        ("user", {}, {"prompt_cache_key": "p"}, ("prompt_cache_key", "p")),
        ("user", {}, {"user": "", "prompt_cache_key": 7}, ("request", "id")),
        ("request", {}, {"user": "u"}, ("request", "id")),
    ],
)
def test_the_unit_is_the_declared_one_or_the_first_there_is(declared, headers, body, expected):
    found = find_unit(declared, headers.get, body, "id")
    assert (found.kind, found.value) == expected


def test_a_unit_is_stored_as_a_salted_hash_and_a_request_not_at_all():
    assigner, other = Assigner(running("e")), Assigner(running("f"))
    stored = assigner.hashed(Unit("user", "anna@example.org"))
    assert stored == unit_hash("e", "anna@example.org")
    assert len(stored) == 32
    assert stored != other.hashed(Unit("user", "anna@example.org")), (
        "stores of two experiments do not tell who is the same"
    )
    assert Assigner(running("f", seed="e")).hashed(Unit("header", "anna@example.org")) == stored
    assert assigner.hashed(Unit("request", "x")) == ""


def test_a_very_long_unit_is_one_unit_and_cheap():
    long = "x" * 1_000_000
    assert bucket("s", long) == bucket("s", long)
    assert bucket("s", long) != bucket("s", long + "y")
    assert bucket("s", "x" * MAX_UNIT) == fnv1a32(str(fnv1a32("s" + "x" * MAX_UNIT))) % 10_000 / 10_000


# -- assignment ----------------------------------------------------------------------------------------------------------


def test_an_assignment_is_sticky_and_in_proportion():
    found = arms_of(running(arms={"a": 3, "b": 1}))
    assert found == arms_of(running(arms={"a": 30, "b": 10}))
    assert {a.reason for a in found} == {"SPLIT"}
    assert Counter(a.variant for a in found)["b"] == pytest.approx(5_000, rel=0.05)


def test_coverage_gives_the_rest_to_control_uncounted():
    found = arms_of(running(coverage=0.2, control="b"))
    outside = [a for a in found if not a.counted]
    assert len(outside) == pytest.approx(16_000, rel=0.03)
    assert {(a.variant, a.reason, a.cause) for a in outside} == {("b", "DEFAULT", "not covered")}


def test_experiments_of_a_namespace_exclude_each_other():
    one = running("one", namespace={"name": "chat", "range": [0, 0.5]})
    two = running("two", namespace={"name": "chat", "range": [0.5, 1]})
    pairs = list(zip(arms_of(one), arms_of(two), strict=True))
    assert all(a.counted != b.counted for a, b in pairs), "everybody is in exactly one of the two"
    assert {b.reason for a, b in pairs if a.counted} == {"DEFAULT"}


def test_the_holdout_is_the_same_in_every_experiment_of_the_namespace():
    spaces = [{"name": "chat", "range": [0, 1]}]
    one, two = (arms_of(running(name, holdout=0.1, namespace=spaces[0])) for name in ("one", "two"))
    held = [unit for unit, a in zip(UNITS, one, strict=True) if a.cause == "holdout"]
    assert len(held) == pytest.approx(2_000, rel=0.1)
    assert held == [unit for unit, a in zip(UNITS, two, strict=True) if a.cause == "holdout"]
    assert all(a.variant == "a" for a in one if a.cause == "holdout")


def test_arms_of_two_experiments_are_independent():
    pairs = Counter(
        (a.variant, b.variant) for a, b in zip(arms_of(running("one")), arms_of(running("two")), strict=True)
    )
    assert all(count == pytest.approx(5_000, rel=0.06) for count in pairs.values())


@pytest.mark.parametrize(
    ("now", "reason", "cause"), [(99, "DISABLED", "not started"), (100, "SPLIT", ""), (200, "DISABLED", "ended")]
)
def test_before_the_start_and_from_the_end_on_everybody_gets_control(now, reason, cause):
    setup = running(start="1970-01-01T00:01:40Z", end="1970-01-01T00:03:20+00:00")
    found = arms_of(setup, now=now)
    assert {(a.reason, a.cause) for a in found} == {(reason, cause)}
    assert ("b" in {a.variant for a in found}) is (reason == "SPLIT")


def test_a_forced_arm_wins_over_everything_and_does_not_count():
    setup = running(coverage=0, end="1970-01-01T00:00:10Z")
    (found,) = arms_of(setup, ["u"], 99.0, forced="b", withdrawn=Withdrawn("a"))
    assert (found.variant, found.reason, found.counted) == ("b", "TARGETING_MATCH", False)


def test_what_was_decided_holds_for_everybody():
    (found,) = {*arms_of(running(), withdrawn=Withdrawn("b", "STATIC", "promoted"))}
    assert (found.variant, found.reason, found.cause) == ("b", "STATIC", "promoted")


def test_a_breach_returns_its_own_arm_s_units_alone():
    setup = running(arms={"a": 1, "b": 1, "c": 1})
    before, after = arms_of(setup), arms_of(setup, withdrawn=Withdrawn(breached={"b": "guardrail errors"}))
    for one, other in zip(before, after, strict=True):
        if one.variant == "b":
            assert (other.variant, other.reason, other.cause) == ("a", "DISABLED", "guardrail errors")
        else:
            assert one == other


def test_an_arm_that_cannot_be_made_is_an_error_and_control_answers():
    found = arms_of(running(), withdrawn=Withdrawn(failed={"b": "its adapter is gone"}))
    assert {(a.variant, a.reason) for a in found} == {("a", "SPLIT"), ("a", "ERROR")}


def test_what_is_kept_of_a_definition_comes_back_the_same():
    setup = running(
        arms={"a": 2, "b": {"serve": "other", "weight": 1}},
        start="2026-01-31T09:00:00+02:00",
        namespace={"name": "n", "range": [0.1, 0.2]},
        guardrails=[{"metric": "first_token", "quantile": 0.99, "max": 2}],
        unit={"header": "X-User"},
    )
    assert Running.from_document("e", 1, json.loads(json.dumps(setup.to_document()))) == setup


def test_an_arm_whose_adapter_cannot_be_read_for_once_does_not_end_what_was_decided():
    """A version counts changes of what is meant; a folder that is missing at one start is none."""
    experiment = Experiment.model_validate({"arms": {"a": 1, "b": 1}})
    first = follow("e", experiment, {"a": "a@1", "b": "b@2"}, None)
    assert follow("e", experiment, {"a": "a@1", "b": ""}, first) is first
    assert follow("e", experiment, {"a": "a@1", "b": "b@3"}, first).version == 2
