# SPDX-License-Identifier: Apache-2.0
"""What is measured of every answer, without anybody sending an outcome: names, units, and the sums they are ratios of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["share", "number", "seconds"]


@dataclass(frozen=True)
class Measure:
    """A ratio of two columns of the table `units`. label: what it is, for people."""

    name: str
    numerator: str
    denominator: str
    kind: Kind
    label: str


_ALL = (
    Measure("errors", "errors", "requests", "share", "requests that failed"),
    Measure("refusals", "refusals", "requests", "share", "answers that were refusals"),
    Measure("length", "tokens", "answers", "number", "tokens of an answer"),
    Measure("first_token", "first_token_sum", "first_token_n", "seconds", "time to the first token"),
    Measure("gap", "gap_sum", "gap_n", "seconds", "time between two tokens"),
    Measure("seconds", "seconds_sum", "seconds_n", "seconds", "time of the whole answer"),
)
MEASURES = {measure.name: measure for measure in _ALL}
LESS_IS_BETTER = frozenset(MEASURES) - {"length"}


def shown(value: float, kind: Kind, *, signed: bool = False) -> str:
    """A value (or a difference of two: signed) for people."""
    sign = "+" if signed else ""
    if kind == "share":
        return f"{100 * value:{sign}.3g} %" if not signed else f"{100 * value:{sign}.3g} points"
    if kind == "seconds":
        return f"{value:{sign}.3g} s" if abs(value) >= 1 else f"{1e3 * value:{sign}.3g} ms"
    return f"{value:{sign}.4g}"
