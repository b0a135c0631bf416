# SPDX-License-Identifier: Apache-2.0
"""What pairs of answers to the same requests say about two arms: means over pairs, clustered by unit, with confidence sequences.

A difference within a pair has the request's own share in length and time taken out, so it shows with far fewer units than one
between arms. These figures explain; they do not decide, since nobody saw the second answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

from sqlalchemy import ColumnElement, Connection, Double, and_, case, cast, func, or_, select

from vllm_merge.experiments.findings import finite
from vllm_merge.experiments.measures import Kind
from vllm_merge.experiments.pairs import OK
from vllm_merge.experiments.statistics.comparison import Arm
from vllm_merge.experiments.statistics.correction import shared_alpha
from vllm_merge.experiments.statistics.estimate import ratio
from vllm_merge.experiments.statistics.sequence import ALPHA, MIN_UNITS, MIN_UNITS_ALONE
from vllm_merge.experiments.statistics.sums import Sums
from vllm_merge.experiments.tables import pairs
from vllm_merge.recipe.experiments import Experiment

Column = ColumnElement[Any]


@dataclass(frozen=True)
class Reading:
    """difference: arm − control; otherwise a value of the pair. least: units before there is an interval, of what is no share."""

    metric: str
    kind: Kind
    label: str
    difference: bool = False
    least: int = MIN_UNITS


# Shares of a pair lie in [0, 1] and need not be 0 or 1. The interval of shares holds for them too, from the first unit on: its evidence
# is convex in each value, so what lies between counts for no more than 0s and 1s of the same mean (Hoeffding, JASA 58, 1963, §4).
READINGS = (
    Reading("equal", "share", "pairs with the same tokens"),
    Reading("agreement", "share", "tokens before the first difference, of the longer answer"),
    Reading("preferred", "share", "judge likes the arm's answer better than control's; ties count half"),
    Reading("length", "number", "tokens of an answer", difference=True),
    Reading("seconds", "seconds", "time of the whole answer", difference=True),
    Reading("first_token", "seconds", "time to the first token", difference=True),
    # The ends of a long tail are not cancelled by another arm's.
    Reading("kl", "number", "KL(answer ‖ shadow) of the next token, at least, in nats", least=MIN_UNITS_ALONE),
    Reading("missing", "share", "probability that KL does not see, of the arm that answered"),
    Reading("shadow_missing", "share", "probability that KL does not see, of the shadow"),
)


@dataclass(frozen=True)
class PairedValue:
    """One reading: its mean, and the interval of it; None where nothing can be said yet."""

    metric: str
    kind: Kind
    label: str
    difference: bool
    units: int
    value: float | None
    low: float | None
    high: float | None


def paired(connection: Connection, name: str, versions: Sequence[int], experiment: Experiment) -> list[dict[str, Any]]:
    """For every two arms that were compared, control first: control, arm, pairs, answered ({arm: pairs in which it answered the
    client}), dropped ({why: pairs}), values. Intervals hold for all comparisons of one reading together.
    """
    ours = and_(pairs.c.experiment == name, pairs.c.version.in_(versions))
    key = (pairs.c.arm, pairs.c.shadow, pairs.c.outcome)
    rows = connection.execute(select(*key, func.count()).where(ours).group_by(*key)).all()
    control = experiment.control_arm
    arms = [control, *(arm for arm in experiment.arms if arm != control)]
    seen = [both for both in combinations(arms, 2) if any({row[0], row[1]} == set(both) for row in rows)]
    found = []
    for first, other in seen:
        mine = [(arm, outcome, count) for arm, shadow, outcome, count in rows if {arm, shadow} == {first, other}]
        answered = {arm: sum(n for who, outcome, n in mine if (who, outcome) == (arm, OK)) for arm in (first, other)}
        dropped: dict[str, int] = {}
        for _, outcome, count in mine:
            if outcome != OK:
                dropped[outcome] = dropped.get(outcome, 0) + count
        values = _values(connection, ours, first, other, shared_alpha(ALPHA, len(seen)))
        found.append(
            {
                "control": first,
                "arm": other,
                "pairs": sum(answered.values()),
                "answered": answered,
                "dropped": dropped,
                "values": [asdict(value) for value in values],
            }
        )
    return found


def _values(connection: Connection, ours: Column, first: str, other: str, alpha: float) -> Iterator[PairedValue]:
    p = pairs.c
    both = or_(and_(p.arm == first, p.shadow == other), and_(p.arm == other, p.shadow == first))
    cells: list[Column] = []
    for reading in READINGS:
        value = _value(reading, first)
        cells += [func.sum(value).label(f"{reading.metric}_x"), func.count(value).label(f"{reading.metric}_d")]
    each = (
        select(*cells).where(ours, both, p.outcome == OK).group_by(func.coalesce(func.nullif(p.unit, ""), p.exposure))
    )
    by_unit = each.subquery()
    sums: list[Column] = []
    for reading in READINGS:
        x = func.coalesce(by_unit.c[f"{reading.metric}_x"], 0.0)
        d = cast(by_unit.c[f"{reading.metric}_d"], Double)
        sums += [func.sum(case((d > 0, 1.0), else_=0.0)), *(func.sum(v) for v in (x, d, x * x, d * d, x * d))]
    totals = [float(total or 0.0) for total in connection.execute(select(*sums)).one()]
    for index, reading in enumerate(READINGS):
        found = Sums(*totals[6 * index : 6 * index + 6])
        estimate = ratio(found)
        interval = Arm(found, estimate, reading.kind == "share").interval(alpha, reading.least)
        ends = finite(estimate.value), finite(interval.low), finite(interval.high)
        yield PairedValue(reading.metric, reading.kind, reading.label, reading.difference, int(found.units), *ends)


def _value(reading: Reading, first: str) -> Column:
    """Of one pair, as a float; NULL where it was not measured."""
    p = pairs.c
    if reading.metric == "equal":
        return case((p.equal.is_(None), None), (p.equal, 1.0), else_=0.0)
    if reading.metric == "preferred":
        return case((p.arm == first, p.preferred), else_=1.0 - p.preferred)
    if not reading.difference:
        return p[reading.metric]
    column = "tokens" if reading.metric == "length" else reading.metric
    mine, shadow = cast(p[column], Double), cast(p[f"shadow_{column}"], Double)
    return case((p.arm == first, shadow - mine), else_=mine - shadow)
