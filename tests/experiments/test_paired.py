# SPDX-License-Identifier: Apache-2.0
"""Pairs of answers: agreement, divergence of distributions that are known in part, and what the report says of them."""

import json
import math

import numpy as np
import pytest

from tests.experiment_records import define, pair
from vllm_merge.cli.experiment_text import print_report
from vllm_merge.experiments.divergence import truncated_kl
from vllm_merge.experiments.pairs import agreement
from vllm_merge.experiments.report import report
from vllm_merge.experiments.running import Running, follow
from vllm_merge.experiments.statistics.comparison import Arm
from vllm_merge.experiments.statistics.estimate import ratio
from vllm_merge.experiments.statistics.sequence import interval
from vllm_merge.experiments.statistics.sums import Sums
from vllm_merge.recipe.experiments import Experiment
from vllm_merge.report.experiment_page import experiment_page


@pytest.mark.parametrize(
    ("first", "second", "share"),
    [
        ([], [], 1.0),
        ([1, 2, 3], [1, 2, 3], 1.0),
        ([1, 2, 3, 4], [1, 2, 9, 4], 0.5),
        ([1, 2], [1, 2, 3, 4], 0.5),
        ([1, 2, 3, 4], [1], 0.25),
        ([], [1], 0.0),
        ([5, 2], [1, 2], 0.0),
    ],
)
def test_agreement_is_up_to_the_first_difference_and_of_the_longer_answer(first, second, share):
    assert agreement(first, second) == share == agreement(second, first)


def top(p, k: int) -> dict[int, float]:
    return {int(token): math.log(p[token]) for token in np.argsort(-p)[:k]}


def dense_kl(p, q) -> float:
    return float((p * np.log(p / q)).sum())


@pytest.mark.parametrize("seed", range(20))
def test_the_divergence_is_a_lower_bound_that_grows_with_what_is_known(seed):
    random = np.random.default_rng(seed)
    logits = random.normal(size=50) * 2
    p, q = (np.exp(values) / np.exp(values).sum() for values in (logits, logits + random.normal(size=50) * 0.7))
    found = [truncated_kl(top(p, k), top(q, k)) for k in (5, 20, 50)]
    assert 0 <= found[0].kl <= dense_kl(p, q) + 1e-12
    assert found[1].kl <= dense_kl(p, q) + 1e-12
    assert found[2].kl == pytest.approx(dense_kl(p, q), rel=1e-9)
    assert found[2].missing == pytest.approx(0, abs=1e-9)
    common = top(p, 20).keys() & top(q, 20).keys()
    assert found[1].missing == pytest.approx(1 - sum(p[token] for token in common))
    assert found[1].other_missing == pytest.approx(1 - sum(q[token] for token in common))
    rest = np.array([1 - sum(x[t] for t in common) for x in (p, q)])
    cells = [np.append([x[t] for t in sorted(common)], r) for x, r in zip((p, q), rest, strict=True)]
    assert found[1].kl == pytest.approx(dense_kl(*cells))


def test_equal_distributions_do_not_diverge_and_those_without_a_common_token_say_nothing():
    p = np.array([0.6, 0.3, 0.1])
    assert truncated_kl(top(p, 2), top(p, 2)).kl == 0
    apart = truncated_kl({1: math.log(0.9)}, {2: math.log(0.9)})
    assert (apart.kl, apart.missing, apart.other_missing) == (0, 1, 1)
    certain = truncated_kl({1: math.log(0.5), 2: math.log(0.4)}, {1: 0.0, 2: -9999.0})  # vLLM's least
    assert math.isfinite(certain.kl)
    assert certain.kl > 100


def test_means_are_over_units_and_differences_are_from_control(each_store):
    store, random = each_store, np.random.default_rng(1)
    define(store)
    rows, by_unit = [], {}
    for number in range(300):
        unit = f"user {number % 60}"
        mine, other = int(random.integers(10, 40)), int(random.integers(15, 60))
        by_unit.setdefault(unit, []).append(other - mine)
        turned = number % 3 == 0  # b answered the client, a was the shadow
        tokens = {"tokens": other, "shadow_tokens": mine} if turned else {"tokens": mine, "shadow_tokens": other}
        arms = ("b", "a") if turned else ("a", "b")
        rows.append(pair(number, *arms, unit=unit, equal=number % 4 == 0, first_token=None, **tokens))
    dropped = [pair(1000 + i, outcome=("busy", "too_many")[i % 2], tokens=None) for i in range(5)]
    store.add_pairs([*rows, *dropped, pair(2000, version=7, tokens=10**6), pair(2001, experiment="x", tokens=10**6)])
    (both,) = report(store, "ab")["paired"]
    assert (both["control"], both["arm"], both["pairs"]) == ("a", "b", 300)
    assert both["answered"] == {"a": 200, "b": 100}
    assert both["dropped"] == {"busy": 3, "too_many": 2}
    values = {value["metric"]: value for value in both["values"]}
    counts = [float(len(found)) for found in by_unit.values()]
    expected = ratio(Sums.of([float(sum(found)) for found in by_unit.values()], counts))
    ends = interval(expected)
    length = values["length"]
    assert length["units"] == 60
    assert [length[key] for key in ("value", "low", "high")] == pytest.approx([expected.value, ends.low, ends.high])
    assert length["low"] > 0, "b is longer"
    assert values["seconds"]["value"] == pytest.approx((200 * 0.1 - 100 * 0.1) / 300)
    assert values["equal"]["value"] == pytest.approx(0.25)
    assert 0 < values["equal"]["low"] < 0.25 < values["equal"]["high"] < 1
    assert values["kl"]["value"] == pytest.approx(0.2)
    assert values["kl"]["high"] is None, "a long tail needs more units"
    assert (values["first_token"]["value"], values["first_token"]["units"]) == (None, 0)


def test_nothing_is_said_of_few_pairs_and_of_none(store):
    define(store)
    assert report(store, "ab")["paired"] == []
    store.add_pairs([pair(number) for number in range(49)])
    (both,) = report(store, "ab")["paired"]
    values = {value["metric"]: value for value in both["values"]}
    assert (values["length"]["value"], values["length"]["low"], values["length"]["high"]) == (2, None, None)
    assert values["preferred"]["low"] < values["preferred"]["value"] == 1 == values["preferred"]["high"], "no certainty"


def test_the_judge_s_word_is_about_the_arm_whoever_answered_the_client(store):
    define(store)
    store.add_pairs([pair(i, "a", "b", preferred=1.0) for i in range(30)])
    store.add_pairs([pair(i, "b", "a", preferred=(0.0, 0.5)[i % 2]) for i in range(30, 60)])
    store.add_pairs([pair(60, preferred=None)])
    (both,) = report(store, "ab")["paired"]
    (preferred,) = (value for value in both["values"] if value["metric"] == "preferred")
    assert preferred["value"] == pytest.approx((30 + 15 + 0.5 * 15) / 60)
    assert preferred["units"] == 60


def test_intervals_of_shares_between_0_and_1_hold_at_all_times():
    """Agreement of 400 experiments, looked at after every pair: the mean is missed by at most the 5 % that are allowed."""
    random = np.random.default_rng(5)
    values = random.beta(0.5, 0.2, size=(400, 300))
    units = np.arange(1.0, 301.0)
    sums = Sums(units, values.cumsum(1), units, (values**2).cumsum(1), units, values.cumsum(1))
    found = Arm(sums, ratio(sums), True).interval()
    truth = 0.5 / 0.7
    missed = ((found.low > truth) | (found.high < truth)).any(axis=1)
    assert missed.mean() <= 0.05


def test_the_report_shows_pairs_as_text_and_on_a_page(store, capsys):
    define(store)
    store.add_pairs([pair(number, kl=0.1 + number % 2) for number in range(500)] + [pair(1000, outcome="busy")])
    facts = report(store, "ab")
    json.dumps(facts, allow_nan=False)
    print_report(facts)
    said = capsys.readouterr()
    assert "two answers to the same request" in said.out
    assert "length: b − a" in said.out
    assert "a and b: of 501 pairs these were dropped: 1 busy." in " ".join((said.out + said.err).split())
    page = experiment_page(facts)
    assert "Two answers to the same request" in page
    assert "agreement" in page


def test_every_two_arms_are_compared_and_share_the_level(store):
    define(store, arms={"b": 1, "a": 1, "c": 1}, control="a")
    rows = [pair(i, "a", "b", tokens=20 + i % 2) for i in range(100)]
    store.add_pairs(rows)
    (alone,) = report(store, "ab")["paired"]
    store.add_pairs([pair(i, "c", "b") for i in range(100, 200)] + [pair(i, "c", "a") for i in range(200, 300)])
    all_ = report(store, "ab")["paired"]
    assert [(both["control"], both["arm"]) for both in all_] == [("a", "b"), ("a", "c"), ("b", "c")]

    def width(both):
        (length,) = (value for value in both["values"] if value["metric"] == "length")
        return length["high"] - length["low"]

    assert width(all_[0]) > width(alone)


def test_a_definition_without_shadow_reads_as_it_always_did():
    given = {"arms": {"a": 1, "b": 1}}
    plain = follow("ab", Experiment.model_validate(given), {"a": "a@1", "b": "b@1"}, None)
    assert "shadow" not in plain.to_document()["experiment"]
    wanted = Experiment.model_validate({**given, "shadow": {"share": 0.5, "compare": ["answers"]}})
    changed = follow("ab", wanted, {"a": "a@1", "b": "b@1"}, plain)
    assert changed.version == 2
    assert Running.from_document("ab", 2, changed.to_document()) == changed
    assert changed.ranges == plain.ranges
