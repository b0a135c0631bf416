# SPDX-License-Identifier: Apache-2.0
"""Seconds and bytes from the constants of a calibration."""

from typing import Any

import pytest
import torch

from vllm_merge.forecast import cost
from vllm_merge.forecast.cost import BOUND, Calibration, Cost, DeviceCost, calibrations, cost_on
from vllm_merge.forecast.probe import Speed, measure_speed
from vllm_merge.forecast.work import QUANTITIES, ModuleSize
from vllm_merge.plan_runner import WORKSPACE_BYTES

MODULES = [ModuleSize(10, 6, (2, 1), 3)] * 4
SPEED = Speed(bytes=1e9, operations=1e12, call=1e-6)
COST = Cost(
    seconds={"fixed": 1.0, "stacked": 0.5, "grams": 0.25}, workspace={"modules": 100.0}, workspace_share=350 / BOUND
)


def a_calibration(device: str = "Some GPU", kind: str = "cuda") -> Calibration:
    return Calibration(device, kind, SPEED, {"ties/knots/whole": COST})


def test_seconds_are_the_sum_of_constants_times_work() -> None:
    on = DeviceCost(a_calibration(), a_calibration().slower(None))
    found = on.predict("ties/knots/whole", "knots", MODULES)
    assert found is not None
    assert found[0] == 1 + 4 * (0.5 * 48 + 0.25 * 144)


def test_the_workspace_is_a_share_of_the_bound_at_most() -> None:
    even = a_calibration().slower(None)
    assert COST.predict("knots", MODULES[:2], even)[1] == 200
    assert COST.predict("knots", MODULES, even)[1] == 350
    assert COST.of_work({"fixed": 1, "stacked": 0, "grams": 0, "modules": 4}, even, BOUND // 2)[1] == 175
    assert BOUND == WORKSPACE_BYTES, "what a merge may hold that is not told another bound"


def test_a_workspace_that_the_bound_alone_decides() -> None:
    dense = Cost(seconds={}, workspace={}, workspace_share=0.5)
    assert dense.predict("delta", MODULES[:1], a_calibration().slower(None))[1] == BOUND / 2


def test_a_slower_device_takes_longer_at_what_it_is_slower_at() -> None:
    half_the_bytes = a_calibration().slower(Speed(bytes=5e8, operations=1e12, call=3e-6))
    assert half_the_bytes == {"call": 3, "bytes": 2, "operations": 1}
    assert COST.predict("knots", MODULES, half_the_bytes)[0] == 3 + 4 * (2 * 0.5 * 48 + 0.25 * 144)


def test_what_was_not_measured_has_no_forecast() -> None:
    on = DeviceCost(a_calibration(), a_calibration().slower(None))
    assert on.predict("ties/knots/cut", "knots", MODULES) is None


def test_a_measured_device_is_taken_as_it_is_and_another_is_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    probes: list[str] = []

    def probe(device: str) -> Speed:
        probes.append(device)
        return Speed(bytes=5e8, operations=5e11, call=2e-6)

    monkeypatch.setattr(cost, "measure_speed", probe)
    monkeypatch.setattr(cost, "calibrations", lambda: [a_calibration(), a_calibration("CPU, 2 threads", "cpu")])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: {"cuda:0": "Some GPU"}.get(device, "Another"))
    cost_on.cache_clear()
    try:
        found = {device: cost_on(device) for device in ("cuda:0", "cuda:1", "cpu", "mps")}
    finally:
        cost_on.cache_clear()
    assert probes == ["cuda:1", "cpu"]
    slower = {device: on.slower["bytes"] for device, on in found.items() if on is not None}
    assert slower == {"cuda:0": 1, "cuda:1": 2, "cpu": 2}


def test_a_cpu_is_probed() -> None:
    speed = measure_speed("cpu")
    assert speed.bytes > 1e8
    assert speed.operations > 1e8
    assert 1e-8 < speed.call < 1e-2


def test_the_shipped_constants_are_whole() -> None:
    assert {calibration.type for calibration in calibrations()} >= {"cuda"}
    for calibration in calibrations():
        assert calibration.type in ("cpu", "cuda")
        assert calibration.costs, f"{calibration.device} has no way to merge"
        for constants in calibration.costs.values():
            every: dict[str, Any] = {**constants.seconds, **{f"w {k}": v for k, v in constants.workspace.items()}}
            assert {name.removeprefix("w ") for name in every} <= QUANTITIES.keys()
            assert all(value > 0 for value in every.values())
            assert 0 < constants.workspace_share < 1.5
