# SPDX-License-Identifier: Apache-2.0
"""The tables of an experiment's report: heads and rows of plain text, for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from vllm_merge.experiments.measures import shown

Facts = Mapping[str, Any]
Table = tuple[list[str], list[list[str]]]
NONE = "–"


def moment(at: float | None) -> str:
    """2026-01-31 09:00:00 UTC"""
    return NONE if at is None else datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def arm_rows(facts: Facts) -> Table:
    rows = []
    for arm in facts["arms"]:
        name = f"{arm['arm']} (control)" if arm["control"] else arm["arm"]
        serves = arm["artifact"] or arm["serve"]
        counts = [f"{arm[key]:,}" for key in ("units", "requests", "errors", "refusals", "tokens")]
        rows.append([name, serves, f"{100 * arm['share']:.4g} %", *counts])
    return ["arm", "serves", "weight", "units", "requests", "errors", "refusals", "tokens"], rows


def value_rows(facts: Facts) -> Table:
    """A row for each metric, a column for each arm."""
    arms = [arm["arm"] for arm in facts["arms"]]
    rows = []
    for finding in _findings(facts):
        values = {value["arm"]: value["value"] for value in finding["values"]}
        if any(value is not None for value in values.values()):
            cells = [_number(values.get(arm), finding["kind"]) for arm in arms]
            rows.append([finding["metric"], *cells])
    return ["metric", *arms], rows


def difference_rows(facts: Facts) -> Table:
    """What each arm is above control, by metric; only where there is an interval."""
    rows = []
    for finding in _findings(facts):
        kind = finding["kind"]
        for found in finding["differences"]:
            if found["low"] is None or found["high"] is None:
                continue
            ends = [_number(found[key], kind, signed=True) for key in ("difference", "low", "high")]
            lift = NONE if found["lift"] is None else f"{100 * found['lift']:+.3g} %"
            rows.append([finding["metric"], found["arm"], *ends, lift, probability(found["adjusted"]), found["state"]])
    return ["metric", "arm", "difference", "from", "to", "of control", "p", "it is"], rows


def latency_rows(facts: Facts) -> Table:
    arms = [arm["arm"] for arm in facts["arms"]]
    rows = []
    for latency in facts["latencies"]:
        values = {value["arm"]: value for value in latency["values"]}
        if any(value["value"] is not None for value in values.values()):
            name = f"{latency['latency']} p{100 * latency['quantile']:g}"
            rows.append([name, *(_quantile(values[arm]) for arm in arms)])
    return ["latency", *arms], rows


def paired_rows(facts: Facts) -> Table:
    """A row for each reading of the pairs of two arms; differences are those of the second arm from the first."""
    rows = []
    for both in facts["paired"]:
        names = f"{both['control']}, {both['arm']}"
        for value in both["values"]:
            signed, kind = value["difference"], value["kind"]
            if value["value"] is not None:
                what = value["metric"] + (f": {both['arm']} − {both['control']}" if signed else "")
                cells = [_number(value[end], kind, signed=signed) for end in ("value", "low", "high")]
                rows.append([names, what, f"{value['units']:,}", *cells])
    return ["both arms", "of pairs", "units", "mean", "from", "to"], rows


def guardrail_rows(facts: Facts) -> Table:
    rows = [[check["guardrail"], check["arm"], check["state"], check["sentence"]] for check in facts["guardrails"]]
    return ["guardrail", "arm", "it is", "why"], rows


def decision_rows(facts: Facts) -> Table:
    head = ["when", "version", "decision", "arm", "why"]
    return head, [
        [moment(d["at"]), str(d["version"]), d["kind"], d["arm"] or NONE, d["reason"]] for d in facts["decisions"]
    ]


def probability(p: float) -> str:
    return f"{p:.2g}" if p >= 1e-6 else "< 1e-6"


def version(facts: Facts) -> str:
    """`version 3`, with what its figures go back to."""
    since = facts["since_version"]
    return f"version {facts['version']}" + (f" (units since version {since})" if since != facts["version"] else "")


def notes(facts: Facts) -> list[str]:
    """What one should know before reading the figures."""
    found = []
    if facts["crossed"]:
        found.append(f"{facts['crossed']:,} units were seen in more than one arm; they count in each.")
    for metric, outcome in facts["outcomes"].items():
        if outcome["lost"]:
            found.append(
                f"{outcome['lost']:,} of {outcome['count']:,} outcomes {metric} belong to no unit that was seen."
            )
    for both in facts["paired"]:
        if both["dropped"]:
            why = ", ".join(f"{count:,} {outcome}" for outcome, count in sorted(both["dropped"].items()))
            every = both["pairs"] + sum(both["dropped"].values())
            found.append(f"{both['control']} and {both['arm']}: of {every:,} pairs these were dropped: {why}.")
    found += [f"{arm['arm']} was withdrawn: {arm['withdrawn']}" for arm in facts["arms"] if arm["withdrawn"]]
    return found


def _findings(facts: Facts) -> list[Facts]:
    return [*([facts["primary"]] if facts["primary"] else []), *facts["metrics"]]


def _number(value: float | None, kind: Any, *, signed: bool = False) -> str:
    return NONE if value is None else shown(value, kind, signed=signed)


def _quantile(value: Facts) -> str:
    if value["value"] is None:
        return NONE
    high = "…" if value["high"] is None else shown(value["high"], "seconds")
    return f"{shown(value['value'], 'seconds')} ({shown(value['low'], 'seconds')} to {high})"
