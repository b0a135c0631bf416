# SPDX-License-Identifier: Apache-2.0
"""Guardrails: whether an arm is beyond a bound for certain, so that its traffic goes back to control.

Every bound is judged by an interval that holds at all times at once, so that looking every few seconds is no mistake: over all
bounds and arms of an experiment together, however often they are looked at, an arm that keeps its bounds is withdrawn with
a probability of ALPHA at most. A bound is broken when the whole interval is beyond it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vllm_merge.experiments.defined import running_of
from vllm_merge.experiments.findings import finite
from vllm_merge.experiments.latencies import Latencies
from vllm_merge.experiments.measures import MEASURES, shown
from vllm_merge.experiments.readings import Readings
from vllm_merge.experiments.records import Definition
from vllm_merge.experiments.statistics.comparison import NOTHING_KNOWN, arms_of, difference
from vllm_merge.experiments.statistics.sequence import ALPHA, MIN_UNITS, Interval
from vllm_merge.experiments.store import Store
from vllm_merge.recipe.experiments import Experiment, Guardrail

Bound = Literal["max", "max_increase", "max_decrease"]
State = Literal["broken", "kept", "open"]
BOUNDS: tuple[Bound, ...] = ("max", "max_increase", "max_decrease")


@dataclass(frozen=True)
class Check:
    """One bound and one arm. state: `broken` or `kept` where the whole interval is beyond or within it, else `open`."""

    arm: str
    guardrail: str
    bound: Bound
    limit: float
    state: State
    sentence: str


@dataclass(frozen=True)
class Breach:
    """An arm that broke a guardrail, and why, in a sentence."""

    arm: str
    guardrail: str
    reason: str


def breaches(store: Store, definition: Definition) -> list[Breach]:
    """Every arm that breaks a guardrail now. Raises StoreError."""
    experiment = running_of(definition).experiment
    if not experiment.guardrails:
        return []
    versions = store.versions(definition.experiment, definition.version)
    with store.reading() as connection:
        found = checks(Readings(connection, definition.experiment, versions), experiment)
    return [Breach(check.arm, check.guardrail, check.sentence) for check in found if check.state == "broken"]


def checks(readings: Readings, experiment: Experiment) -> list[Check]:
    """Every bound of every guardrail for every arm but control, which has nobody to hand its traffic to."""
    arms = [arm for arm in experiment.arms if arm != experiment.control_arm]
    bounds = [(rail, bound) for rail in experiment.guardrails for bound in BOUNDS if getattr(rail, bound) is not None]
    judge = _Judge(readings, experiment, ALPHA / max(1, len(bounds) * len(arms)))
    return [judge.check(rail, bound, arm) for rail, bound in bounds for arm in arms]


class _Judge:
    """All that the guardrails of an experiment need, read once."""

    def __init__(self, readings: Readings, experiment: Experiment, alpha: float) -> None:
        self._control, self._alpha = experiment.control_arm, alpha
        means = {rail.metric for rail in experiment.guardrails if rail.quantile is None}
        slow = {rail.metric for rail in experiment.guardrails if rail.quantile is not None}
        measures = [measure for name, measure in MEASURES.items() if name in means]
        sums = readings.measures(measures)
        self._means = {m.name: arms_of(sums[m.name], share=m.kind == "share")[0] for m in measures}
        self._latencies = {str(name): Latencies.read(readings, name) for name in slow}

    def check(self, rail: Guardrail, bound: Bound, arm: str) -> Check:
        limit: float = getattr(rail, bound)
        factor = {"max": 0.0, "max_increase": 1 + limit, "max_decrease": 1 - limit}[bound]
        if rail.quantile is not None:
            value, beside, excess = self._of_quantile(rail.metric, rail.quantile, bound, arm, limit, factor)
        else:
            value, beside, excess = self._of_mean(rail.metric, bound, arm, limit, factor)
        if bound == "max_decrease":
            excess = Interval(-excess.high, -excess.low)
        state: State = "broken" if excess.low > 0 else "kept" if excess.high <= 0 else "open"
        return Check(arm, rail.name, bound, limit, state, self._sentence(rail, bound, arm, limit, value, beside, state))

    def _of_mean(
        self, metric: str, bound: Bound, arm: str, limit: float, factor: float
    ) -> tuple[float | None, float | None, Interval]:
        """The arm's mean, control's, and by how much the arm is above the bound."""
        arms = self._means[metric]
        mine, control = arms.get(arm), arms.get(self._control)
        value, beside = (finite(found.estimate.value) if found else None for found in (mine, control))
        if mine is None:
            return value, beside, NOTHING_KNOWN
        if bound == "max":
            found = mine.interval(
                self._alpha, MIN_UNITS
            )  # a long tail makes its lower end too low, which accuses nobody
            return value, beside, Interval(found.low - limit, found.high - limit)
        return value, beside, difference(mine, control, self._alpha, factor) if control else NOTHING_KNOWN

    def _of_quantile(
        self, metric: str, quantile: float, bound: Bound, arm: str, limit: float, factor: float
    ) -> tuple[float | None, float | None, Interval]:
        """The same of a quantile."""
        found = self._latencies[metric]
        value, mine = found.quantile(arm, quantile, self._alpha if bound == "max" else self._alpha / 2)
        beside, control = found.quantile(self._control, quantile, self._alpha / 2)
        if bound == "max":
            return value, beside, Interval(mine.low - limit, mine.high - limit)
        return value, beside, Interval(mine.low - factor * control.high, mine.high - factor * control.low)

    def _sentence(
        self,
        rail: Guardrail,
        bound: Bound,
        arm: str,
        limit: float,
        value: float | None,
        beside: float | None,
        state: State,
    ) -> str:
        """What was found and what is allowed: for a breach, the reason that everybody will read."""
        measure = MEASURES[rail.metric]
        what = rail.name if rail.quantile is None else f"{rail.metric} (p{100 * rail.quantile:g})"
        if value is None or (bound != "max" and beside is None):
            return f"{what}: nothing of {arm} or {self._control} is measured yet"
        found = f"{what} of {arm}: {shown(value, measure.kind)}"
        if bound == "max":
            return f"{found}; {_BEYOND[state]} the {shown(limit, measure.kind)} that is allowed"
        side = "above" if bound == "max_increase" else "below"
        against = f"{shown(beside, measure.kind)} of {self._control}" if beside is not None else ""
        return f"{found}, against {against}; {_BEYOND[state]} the {100 * limit:g} % {side} it that is allowed"


_BEYOND = {"broken": "beyond", "kept": "within", "open": "not yet shown to be within or beyond"}
