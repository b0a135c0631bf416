# SPDX-License-Identifier: Apache-2.0
"""Simulated experiments that are looked at all the time: seldom wrong, and they find what is there.

A few hundred runs of each; benchmarks/experiment_statistics.py makes thousands, and its figures are in benchmarks/results.
"""

import importlib
import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
RUNS = 200


@pytest.fixture
def simulations(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("experiment_simulations")


@pytest.mark.parametrize("index", range(7))
def test_a_difference_that_is_not_there_is_seldom_seen(simulations, index):
    found = simulations.false_positives(simulations.CASES[index], RUNS, 600)
    assert found["false_positives"] <= 0.05
    assert found["false_positives_of_a_test_at_each_look"] > found["false_positives"]
    assert found["coverage"] >= 0.95


def test_nor_among_many_arms_nor_when_units_come_back(simulations):
    assert simulations.false_positives(simulations.CASES[0], RUNS, 600, arms=4)["false_positives"] <= 0.05
    assert simulations.returning_units(RUNS)["false_positives"] <= 0.05


@pytest.mark.parametrize(("level", "clustered"), [(0.5, False), (0.99, False), (0.9, True)])
def test_quantiles_are_where_they_are_said_to_be(simulations, level, clustered):
    assert simulations.quantiles(level, 100, clustered, latencies=1000)["coverage"] >= 0.95


def test_a_true_difference_is_found_as_often_as_planned(simulations):
    found = simulations.power(0.3, RUNS)
    assert found["power"] >= 0.8
    assert found["coverage"] >= 0.95


def test_lost_units_are_seen_and_others_are_not(simulations):
    assert simulations.ratio_mismatch(RUNS, 2000)["said"] == 0
    assert simulations.ratio_mismatch(50, 5000, lost=0.2)["said"] == 1


def test_the_recorded_figures_hold_what_is_promised():
    rows = json.loads((FOLDER / "results" / "experiment_statistics.json").read_text())["rows"]
    wrong = [row for row in rows if "false_positives" in row]
    assert len(wrong) >= 9
    for row in wrong:
        assert row["runs"] >= 2000
        assert row["false_positives"] <= row["nominal"], row["case"]
    for row in rows:
        assert row.get("coverage", 1.0) >= row.get("nominal_coverage", 0.0), row["case"]
        assert row.get("power", 1.0) >= row.get("wanted_power", 0.0), row["case"]


@pytest.mark.full
@pytest.mark.parametrize("index", range(7))
def test_two_thousand_experiments(simulations, index):
    found = simulations.false_positives(simulations.CASES[index], 2000, 2000, seed=11)
    assert found["false_positives"] <= 0.05
    assert found["coverage"] >= 0.95
