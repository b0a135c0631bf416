# SPDX-License-Identifier: Apache-2.0
"""What the figures say, in a sentence: promote, keep control, wait, or do not read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from vllm_merge.experiments.findings import Difference, Finding
from vllm_merge.experiments.guardrails import Check
from vllm_merge.experiments.measures import Kind, shown
from vllm_merge.experiments.statistics.imbalance import Imbalance
from vllm_merge.experiments.statistics.sequence import MIN_UNITS


@dataclass(frozen=True)
class Verdict:
    """advice: what to do. arm: the one to promote, or control; "" where there is none to name."""

    advice: Literal["promote", "keep control", "wait", "do not read", "nothing decides"]
    arm: str
    sentence: str


def verdict(imbalance: Imbalance, primary: Finding | None, checks: Sequence[Check], more_units: int | None) -> Verdict:
    """more_units: about how many more are needed if the leading difference is what it seems to be; None: unknown."""
    if imbalance.mismatch:
        return Verdict("do not read", "", _mismatch(imbalance))
    if primary is None:
        return Verdict(
            "nothing decides", "", "No primary metric is defined, so no figure decides; name one as `primary`."
        )
    broken = {check.arm for check in checks if check.state == "broken"}
    rest = [d for d in primary.differences if d.arm not in broken]
    better = [d for d in rest if d.state == "better"]
    if better:
        return _promote(primary, better)
    if all(d.state == "worse" for d in rest):
        return _keep(primary, broken)
    return _wait(primary, rest, more_units)


def _mismatch(found: Imbalance) -> str:
    counts = ":".join(f"{count:.0f}" for count in found.units)
    expected = ":".join(f"{count:.0f}" for count in found.expected)
    return (
        f"Do not read these figures: the arms have {counts} units where their weights say {expected} (always-valid "
        f"p = {found.always:.1g}). Something loses units of one arm; find it first."
    )


def _promote(primary: Finding, better: list[Difference]) -> Verdict:
    """The best of those that are better for certain."""
    sign = 1 if primary.direction == "increase" else -1
    best, *others = sorted(better, key=lambda d: -sign * (d.difference or 0.0))
    sentence = f"{best.arm} is better than {primary.control}: {said(best, primary)}."
    if others:
        names = ", ".join(d.arm for d in others)
        sentence += f" So {'are' if len(others) > 1 else 'is'} {names}, by less as far as it is known."
    return Verdict("promote", best.arm, sentence)


def _keep(primary: Finding, broken: set[str]) -> Verdict:
    """Every other arm is worse for certain, or broke a guardrail."""
    parts = [
        f"{d.arm} broke a guardrail" if d.arm in broken else f"{d.arm} is worse: {said(d, primary)}"
        for d in primary.differences
    ]
    return Verdict("keep control", primary.control, f"Keep {primary.control}. {'; '.join(parts)}.")


def _wait(primary: Finding, rest: list[Difference], more_units: int | None) -> Verdict:
    counts = {value.arm: value.units for value in primary.values}
    few = min(counts.values(), default=0)
    if few < MIN_UNITS and all(d.low is None for d in rest):
        return Verdict(
            "wait",
            "",
            f"Too early: {primary.metric} has come from {few} units of one arm; there is an interval from {MIN_UNITS} on.",
        )
    parts = [f"{d.arm} − {primary.control}: {said(d, primary)}" for d in rest]
    sentence = f"Not decided yet. {'; '.join(parts)}."
    if more_units:
        sentence += f" If the largest difference is what it seems to be, about {more_units:,} more units will show it."
    return Verdict("wait", "", sentence)


def said(found: Difference, primary: Finding) -> str:
    """`score +0.052 (+10 %), between +0.03 and +0.07 whenever one looks`."""
    kind: Kind = primary.kind
    if found.difference is None:
        return f"{primary.metric} is not known"
    lift = ""
    if found.lift is not None:
        lift = f" ({100 * found.lift:+{'.0f' if abs(found.lift) >= 0.1 else '.2g'}} %)"
    text = f"{primary.metric} {shown(found.difference, kind, signed=True)}{lift}"
    if found.low is None or found.high is None:
        return f"{text}, without an interval yet"
    low, high = (shown(end, kind, signed=True) for end in (found.low, found.high))
    return f"{text}, with an interval from {low} to {high}"
