# SPDX-License-Identifier: Apache-2.0
"""How long a merge takes and how much memory it needs, from constants that were fitted to measured merges.

seconds = Σ_q c_q · (how much of q), q the quantities of `work.py`; the same for the workspace, up to a share of the bound that
the merge is given. Constants of a device are in calibration.json. On a device that is not there, those of one of its type are used, each divided by how much
faster the device is: at starting calls, at moving bytes, or at multiplying.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import torch

from vllm_merge.forecast.probe import Speed, measure_speed
from vllm_merge.forecast.work import QUANTITIES, ModuleSize, quantities

FILE = "calibration.json"
BOUND = 2 << 30  # bytes of workspace, of a merge that is not told another


@dataclass(frozen=True, slots=True)
class Cost:
    """Constants of one way to merge on one device. workspace_share: of its bound, more than this it never held; where
    `workspace` has no constants it held about as much at every point.
    """

    seconds: Mapping[str, float]
    workspace: Mapping[str, float]
    workspace_share: float

    def predict(self, space: str, modules: Sequence[ModuleSize], slower: Mapping[str, float]) -> tuple[float, float]:
        """(seconds, bytes of workspace). slower: {call, bytes, operations: how many times slower than measured}."""
        return self.of_work(quantities(space, modules), slower)

    def of_work(
        self, work: Mapping[str, float], slower: Mapping[str, float], bound: int = BOUND
    ) -> tuple[float, float]:
        """`predict` of these quantities, for a merge that may hold `bound` bytes."""
        seconds = sum(constant * work[name] * slower[QUANTITIES[name]] for name, constant in self.seconds.items())
        held = sum(constant * work[name] for name, constant in self.workspace.items())
        most = self.workspace_share * bound
        return seconds, min(held, most) if self.workspace else most


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was measured on one device."""

    device: str
    type: str
    speed: Speed
    costs: Mapping[str, Cost]

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Calibration:
        """One entry of calibration.json."""
        costs = {key: Cost(**cost) for key, cost in content["costs"].items()}
        return cls(content["device"], content["type"], Speed(**content["speed"]), costs)

    def slower(self, speed: Speed | None) -> dict[str, float]:
        """How many times slower a device of this speed is; 1 for the device itself, which is None."""
        if speed is None:
            return {"call": 1.0, "bytes": 1.0, "operations": 1.0}
        return {
            "call": speed.call / self.speed.call,
            "bytes": self.speed.bytes / speed.bytes,
            "operations": self.speed.operations / speed.operations,
        }


@dataclass(frozen=True, slots=True)
class DeviceCost:
    """A calibration and how it applies to a device at hand."""

    calibration: Calibration
    slower: Mapping[str, float]

    def predict(self, key: str, space: str, modules: Sequence[ModuleSize]) -> tuple[float, float] | None:
        """(seconds, bytes of workspace), or None for a way to merge that was not measured."""
        cost = self.calibration.costs.get(key)
        return None if cost is None else cost.predict(space, modules, self.slower)


def calibrations() -> list[Calibration]:
    """The shipped ones."""
    text = resources.files(__package__).joinpath(FILE).read_text(encoding="utf-8")
    return [Calibration.from_dict(content) for content in json.loads(text)["devices"]]


@cache
def cost_on(device: str) -> DeviceCost | None:
    """What merges cost on this device; None where nothing was measured on one of its type.

    A GPU of a measured name counts as that one. Any other device, and every CPU, is measured for a fraction of a second.
    """
    kind = torch.device(device).type
    name = torch.cuda.get_device_name(device) if kind == "cuda" else None
    known = [calibration for calibration in calibrations() if calibration.type == kind]
    if not known:
        return None
    for calibration in known:
        if calibration.device == name:
            return DeviceCost(calibration, calibration.slower(None))
    return DeviceCost(known[0], known[0].slower(measure_speed(device)))
