# SPDX-License-Identifier: Apache-2.0
"""All that the store says about an experiment, as plain JSON facts. What the command prints, draws and writes is made of them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import numpy as np

from vllm_merge.errors import UserInputError
from vllm_merge.experiments.course import lines
from vllm_merge.experiments.defined import running_of
from vllm_merge.experiments.findings import Better, Finding, finding, finite
from vllm_merge.experiments.guardrails import checks
from vllm_merge.experiments.latencies import Latencies
from vllm_merge.experiments.measures import LESS_IS_BETTER, MEASURES, Kind
from vllm_merge.experiments.paired import paired
from vllm_merge.experiments.readings import Course, Readings
from vllm_merge.experiments.records import Decision
from vllm_merge.experiments.running import Running
from vllm_merge.experiments.statistics.correction import shared_alpha
from vllm_merge.experiments.statistics.estimate import contrast, ratio
from vllm_merge.experiments.statistics.imbalance import Imbalance, imbalance
from vllm_merge.experiments.statistics.power import units_when_watched
from vllm_merge.experiments.statistics.sequence import ALPHA
from vllm_merge.experiments.statistics.sums import Sums
from vllm_merge.experiments.store import Store
from vllm_merge.experiments.tables import LATENCIES
from vllm_merge.experiments.verdict import verdict
from vllm_merge.recipe.experiments import Primary
from vllm_merge.recipe.problems import suggested

Facts = dict[str, Any]
STEPS = 60  # of the course over time
QUANTILES = (0.5, 0.9, 0.99)
_FORESEEABLE = 100  # times the units there are: further ahead nothing is foretold
MOST_METRICS = 30  # outcomes that are reported beside the primary one


def find(store: Store, name: str, version: int | None = None) -> Running:
    """The definition to be reported, the newest without `version`. Raises UserInputError that names what there is."""
    found = store.definition(name, version)
    if found is not None:
        return running_of(found)
    known = store.experiments()
    if name in known:
        raise UserInputError(f"experiment {name} has no version {version} in {store.place}")
    raise UserInputError(f"{store.place}: no experiment {name!r}{suggested(name, known, 'experiments')}")


def state(running: Running, decisions: Sequence[Decision], now: float) -> str:
    """What becomes of its requests now."""
    for decision in reversed(decisions):
        if decision.version == running.version and decision.kind == "stop":
            return "stopped"
        if decision.version == running.version and decision.kind == "promote":
            return f"promoted {decision.arm}"
    moment = datetime.fromtimestamp(now, UTC)
    if running.experiment.runs_at(moment):
        return "running"
    start = running.experiment.start
    return "not started" if start is not None and moment < start else "ended"


def report(store: Store, name: str, version: int | None = None) -> Facts:
    """Every fact about one version of an experiment. Raises UserInputError, StoreError."""
    running = find(store, name, version)
    decisions = store.decisions(name)
    now, versions = time.time(), store.versions(name, running.version)
    mine = [decision for decision in decisions if decision.version in versions]
    with store.reading() as connection:
        facts = _Report(Readings(connection, name, versions), running, mine).facts()
        facts["paired"] = paired(connection, name, versions, running.experiment)
    return {
        "experiment": name,
        "version": running.version,
        "since_version": min(versions),
        "store": store.place,
        "at": now,
        "state": state(running, decisions, now),
        "alpha": ALPHA,
        **facts,
        "decisions": [asdict(decision) for decision in decisions],
        "definition": running.to_document(),
    }


class _Report:
    """What is read within one transaction. decisions: about the versions that are read."""

    def __init__(self, readings: Readings, running: Running, decisions: Sequence[Decision]) -> None:
        self._readings, self._running, self._experiment = readings, running, running.experiment
        self._decisions = decisions
        self._outcomes = readings.outcomes()
        self._course = readings.course(STEPS)
        self._primary_sums: dict[str, Sums] = {}

    def facts(self) -> Facts:
        balance = self._imbalance()
        measured = self._readings.measures(list(MEASURES.values()))
        primary, course = self._primary(self._experiment.primary)
        rails = checks(self._readings, self._experiment)
        found = verdict(balance, primary, rails, self._more_units(primary))
        others = self._metrics(measured, primary.metric if primary else "")
        return {
            "verdict": asdict(found),
            "arms": list(self._arms()),
            "imbalance": {"once": balance.once, "always": balance.always, "mismatch": balance.mismatch},
            "crossed": self._readings.crossed(),
            "outcomes": {metric: asdict(facts) for metric, facts in self._outcomes.items()},
            "primary": primary.to_dict() if primary else None,
            "course": course,
            "metrics": [metric.to_dict() for metric in others],
            "latencies": list(self._latencies()),
            "guardrails": [asdict(check) for check in rails],
        }

    def _imbalance(self) -> Imbalance:
        """Of the units that came before anything was decided: afterwards arms lose their traffic on purpose."""
        first = min((decision.at for decision in self._decisions), default=None)
        counts, weights = self._readings.units_until(first), self._experiment.weights
        return imbalance([counts.get(arm, 0) for arm in weights], list(weights.values()))

    def _arms(self) -> Iterator[Facts]:
        counts = self._readings.counts
        version = self._running.version
        breached = {d.arm: d.reason for d in self._decisions if d.kind == "breach" and d.version == version}
        nothing = dict.fromkeys(("units", "requests", "errors", "refusals", "answers", "tokens"), 0)
        for name, arm in self._experiment.arms.items():
            yield {
                "arm": name,
                "serve": arm.serve,
                "artifact": self._running.artifacts.get(name),
                "share": self._experiment.weights[name],
                "control": name == self._experiment.control_arm,
                "withdrawn": breached.get(name),
                **{key: int(value) for key, value in (nothing | counts.get(name, {})).items()},
                **{key: counts[name][key] if name in counts else None for key in ("first_at", "last_at")},
            }

    def _primary(self, primary: Primary | None) -> tuple[Finding | None, list[Facts]]:
        """The metric that decides, and its course."""
        if primary is None:
            return None, []
        measure = MEASURES.get(primary.metric)
        kind = measure.kind if measure else self._outcome_kind(primary.metric)
        label = measure.label if measure else "outcome"
        if measure:
            sums = self._readings.measures([measure], self._course)[measure.name]
        else:
            sums = self._readings.outcome(primary.metric, self._course)
        by_step = self._of_every_arm(sums, self._course)
        self._primary_sums = {arm: found.total() for arm, found in by_step.items()}
        control = self._experiment.control_arm
        found = finding(primary.metric, kind, label, primary.direction, control, self._primary_sums)
        drawn = lines(kind, control, by_step, self._course) if self._course else []
        return found, [asdict(line) for line in drawn]

    def _outcome_kind(self, metric: str) -> Kind:
        facts = self._outcomes.get(metric)
        return "share" if "=" in metric or (facts is not None and facts.share) else "number"

    def _metrics(self, measured: Mapping[str, Mapping[str, Sums]], primary: str) -> Iterator[Finding]:
        """Every other measure and outcome: they explain, they do not decide."""
        control = self._experiment.control_arm
        for name, measure in MEASURES.items():
            if name == primary:
                continue
            direction: Better | None = "decrease" if name in LESS_IS_BETTER else None
            sums = self._of_every_arm(measured[name], None)
            yield finding(name, measure.kind, measure.label, direction, control, sums)
        for metric in [name for name in self._outcomes if name != primary][:MOST_METRICS]:
            sums = self._of_every_arm(self._readings.outcome(metric), None)
            yield finding(metric, self._outcome_kind(metric), "outcome", None, control, sums)

    def _of_every_arm(self, sums: Mapping[str, Sums], course: Course | None) -> dict[str, Sums]:
        """The arms of the definition in its order, those without any units with zeros."""
        empty = Sums(*(np.zeros(course.steps) if course else 0.0 for _ in range(6)))
        return {arm: sums.get(arm, empty) for arm in self._experiment.arms}

    def _more_units(self, primary: Finding | None) -> int | None:
        """How many more units the largest difference takes to show, in one case of two, if it is what it seems to be."""
        open_ = [d for d in primary.differences if d.state == "unknown" and d.difference] if primary else []
        if not open_:
            return None
        most = max(open_, key=lambda d: abs(d.difference or 0.0))
        arm, control = self._primary_sums[most.arm], self._primary_sums[self._experiment.control_arm]
        found, here = contrast(ratio(arm), ratio(control)), (arm.units + control.units) / 2
        variance = found.variance * here  # of two arms of equal size
        if not variance > 0:
            return None
        level = shared_alpha(ALPHA, len(primary.differences) if primary else 1)
        wanted = units_when_watched(found.value, variance, 0.5, level)
        more = 2 * (wanted - here) if wanted is not None else float("inf")
        return int(more) if 0 < more <= _FORESEEABLE * 2 * here else None

    def _latencies(self) -> Iterator[Facts]:
        for name in LATENCIES:
            found = Latencies.read(self._readings, name)
            for quantile in QUANTILES:
                values = []
                for arm in self._experiment.arms:
                    value, interval = found.quantile(arm, quantile)
                    ends = {"low": finite(interval.low), "high": finite(interval.high)}
                    values.append({"arm": arm, "value": finite(value), **ends})
                yield {"latency": name, "quantile": quantile, "values": values}
