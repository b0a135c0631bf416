# SPDX-License-Identifier: Apache-2.0
"""Seconds and memory of `plan`: from measured merges where there are any of the kind, else from a few modules."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import Run
from vllm_merge.forecast import cost
from vllm_merge.forecast.cost import Calibration, Cost
from vllm_merge.forecast.probe import Speed

SPEED = Speed(bytes=1e9, operations=1e9, call=1e-6)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Cost]]:
    """What was measured on a CPU that is as fast as this one."""
    costs: dict[str, Cost] = {}
    monkeypatch.setattr(cost, "calibrations", lambda: [Calibration("CPU, 2 threads", "cpu", SPEED, costs)])
    monkeypatch.setattr(cost, "measure_speed", lambda device: SPEED)
    cost.cost_on.cache_clear()
    yield costs
    cost.cost_on.cache_clear()


def test_what_was_measured_is_forecast(run: Run, recipe: Path, measured: dict[str, Cost]) -> None:
    measured["task_arithmetic/core/whole"] = Cost({"modules": 5.0}, {"fixed": 1e6}, 1e9)
    found = json.loads(run("plan", recipe, "best", "--json")[1])
    assert found["seconds"]["merge"] == 10
    assert found["seconds"]["forecast_from"] == "CPU, 2 threads"
    inputs, result = 2 * 11 * (2 + 1) * 4, 2 * 11 * 3 * 4
    assert found["peak_bytes"] == inputs + result + 1e6
    text = run("plan", recipe, "best")[1]
    assert "10 s to merge (on cpu, forecast from merges measured on CPU, 2 threads)" in text
    assert "memory   about 1.0 MB while merging, adapters and result included" in text


def test_what_was_not_measured_is_tried(run: Run, recipe: Path, measured: dict[str, Cost]) -> None:
    measured["ties/knots/whole"] = Cost({"modules": 5.0}, {"fixed": 1e6}, 1e9)
    found = json.loads(run("plan", recipe, "best", "--json")[1])
    assert 0 < found["seconds"]["merge"] < 5
    assert found["seconds"]["forecast_from"] is None
    assert found["seconds"]["measured_modules"] == 2
    assert found["peak_bytes"] is None
    assert "(measured on 2 modules on cpu)" in run("plan", recipe, "best")[1]
