# SPDX-License-Identifier: Apache-2.0
"""Which arm a unit gets: a pure function of the experiment and the unit, the same in every process and replica.

The words are OpenFeature's (https://openfeature.dev/specification/types): a flag key (the experiment), a targeting key (the
unit), a variant (the arm) and a reason.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from vllm_merge.experiments.hashing import bucket, namespace_place, unit_hash
from vllm_merge.experiments.running import Running
from vllm_merge.recipe.experiment_values import UNITS

Reason = Literal["STATIC", "SPLIT", "TARGETING_MATCH", "DEFAULT", "ERROR", "DISABLED"]


@dataclass(frozen=True)
class Unit:
    """Who is assigned. kind: the request's field, `header`, or `request`; value: as it was sent, never to be stored."""

    kind: str
    value: str


@dataclass(frozen=True)
class Assignment:
    """flag_key, variant, reason: OpenFeature's. cause: why, in a few words, where the reason alone does not tell."""

    flag_key: str
    variant: str
    reason: Reason
    cause: str = ""

    @property
    def counted(self) -> bool:
        """Whether the lot decided, so that the answer says something about the arm."""
        return self.reason == "SPLIT"


@dataclass(frozen=True)
class Withdrawn:
    """What was decided after the start. settled: the arm that everybody gets, and why; breached, failed: {arm: why} of arms
    whose units get control.
    """

    settled: str | None = None
    reason: Reason = "STATIC"
    cause: str = ""
    breached: Mapping[str, str] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)


NOTHING = Withdrawn()


def find_unit(declared: Any, header: Callable[[str], str | None], body: Mapping[str, Any], request_id: str) -> Unit:
    """The unit of a request: the declared one, else the first of UNITS that the body has, else the request.

    declared: an experiment's `unit`. header(name) is a header's value, or None.
    """
    if declared == "request":
        return Unit("request", request_id)
    if isinstance(declared, dict):
        value = header(declared["header"])
        if value:
            return Unit("header", value)
        declared = UNITS[0]
    for name in (declared, *UNITS):
        value = body.get(name)
        if isinstance(value, str) and value:
            return Unit(name, value)
    return Unit("request", request_id)


class Assigner:
    """One experiment, prepared so that an assignment takes microseconds."""

    def __init__(self, running: Running) -> None:
        self.running = running
        experiment = running.experiment
        self._name, self._control = running.name, experiment.control_arm
        self._seed = experiment.seed or running.name
        self._namespace = experiment.namespace
        self._holdout = experiment.holdout
        self._holdout_seed = f"holdout:{experiment.namespace.name if experiment.namespace else ''}"
        self._start = experiment.start.timestamp() if experiment.start else None
        self._end = experiment.end.timestamp() if experiment.end else None
        intervals = sorted((*interval, arm) for arm, found in running.ranges.items() for interval in found)
        self._starts = [start for start, _, _ in intervals]
        self._ends = [end for _, end, _ in intervals]
        self._arms = [arm for _, _, arm in intervals]

    def takes(self, unit: str) -> bool:
        """Whether the unit is in this experiment's part of its namespace."""
        if self._namespace is None:
            return True
        start, end = self._namespace.range
        return start <= namespace_place(self._namespace.name, unit) < end

    def assign(self, unit: str, now: float, withdrawn: Withdrawn = NOTHING, forced: str | None = None) -> Assignment:
        """now: seconds since the epoch. forced: an arm that the request asks for and may have."""
        if forced is not None:
            return Assignment(self._name, forced, "TARGETING_MATCH", "forced")
        if withdrawn.settled is not None:
            return Assignment(self._name, withdrawn.settled, withdrawn.reason, withdrawn.cause)
        if self._start is not None and now < self._start:
            return self._to_control("DISABLED", "not started")
        if self._end is not None and now >= self._end:
            return self._to_control("DISABLED", "ended")
        if not self.takes(unit):
            return self._to_control("DEFAULT", "not in the namespace's range")
        if self._holdout and bucket(self._holdout_seed, unit) < self._holdout:
            return self._to_control("DEFAULT", "holdout")
        arm = self.arm_at(bucket(self._seed, unit))
        if arm is None:
            return self._to_control("DEFAULT", "not covered")
        if arm in withdrawn.breached:
            return self._to_control("DISABLED", withdrawn.breached[arm])
        if arm in withdrawn.failed:
            return self._to_control("ERROR", withdrawn.failed[arm])
        return Assignment(self._name, arm, "SPLIT")

    def arm_at(self, place: float) -> str | None:
        """The arm whose ranges hold `place`, None where no arm's do."""
        index = bisect_right(self._starts, place) - 1
        while index >= 0 and place >= self._ends[index] and self._starts[index] == self._ends[index]:
            index -= 1  # an arm of weight 0, at the same place
        return self._arms[index] if index >= 0 and place < self._ends[index] else None

    def hashed(self, unit: Unit) -> str:
        """What is stored for the unit; "" where every request is its own."""
        return "" if unit.kind == "request" else unit_hash(self._seed, unit.value)

    def _to_control(self, reason: Reason, cause: str) -> Assignment:
        return Assignment(self._name, self._control, reason, cause)
