# SPDX-License-Identifier: Apache-2.0
"""What the store says about an experiment, added up inside the database: a few rows for each arm, however many requests.

Sums are over units. Where a course over time is wanted they are cut by when a unit came (its first exposure, or its first outcome),
so that the sums up to some point of it are those of the units that had come by then, each with all that it did.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from sqlalchemy import (
    ColumnElement,
    Connection,
    Double,
    FromClause,
    Integer,
    Label,
    Select,
    Subquery,
    and_,
    case,
    cast,
    exists,
    func,
    literal,
    literal_column,
    select,
    union_all,
)

from vllm_merge.experiments.bins import WIDTH
from vllm_merge.experiments.measures import Measure
from vllm_merge.experiments.statistics.quantile import Clusters
from vllm_merge.experiments.statistics.sums import Array, Sums
from vllm_merge.experiments.tables import histograms, outcomes, units

Column = ColumnElement[Any]


@dataclass(frozen=True)
class Course:
    """A stretch of time in equal steps, from `start` in seconds since the epoch."""

    start: float
    step: float
    steps: int

    def ends(self) -> list[float]:
        return [self.start + self.step * (index + 1) for index in range(self.steps)]


@dataclass(frozen=True)
class OutcomeFacts:
    """count: outcomes. lost: those that belong to no unit that was seen. share: whether all are 0 or 1."""

    count: int
    lost: int
    share: bool


@dataclass(frozen=True)
class Histogram:
    """Latencies of one arm. edges: (bins + 1,), seconds, rising; counts: (bins,)."""

    edges: Array
    counts: Array

    def square_logs(self) -> float:
        """The sum of the squared logarithms, each latency taken in the middle of its bin."""
        middles = (np.log(self.edges[1:]) + np.log(self.edges[:-1])) / 2
        return float((self.counts * middles**2).sum())


class Readings:
    """One phase of one experiment, within one transaction. versions: all of the phase."""

    def __init__(self, connection: Connection, experiment: str, versions: Sequence[int]) -> None:
        self._connection, self._experiment, self._versions = connection, experiment, versions
        version = self._version = min(versions)
        self._sqlite = connection.dialect.name == "sqlite"
        self._ours = and_(units.c.experiment == experiment, units.c.version == version)

    def course(self, steps: int) -> Course | None:
        """From the first new unit to the last; None where there are not two moments."""
        ends = select(func.min(units.c.first_at), func.max(units.c.first_at)).where(self._ours)
        first, last = self._connection.execute(ends).one()
        # A little longer than it lasted: the last unit belongs to the last step.
        return Course(first, (last - first) * (1 + 1e-9) / steps, steps) if first is not None and last > first else None

    @cached_property
    def counts(self) -> dict[str, dict[str, float]]:
        """{arm: units, requests, errors, refusals, answers, tokens, first_at, last_at}."""
        names = ("requests", "errors", "refusals", "answers", "tokens")
        totals = [self._sum(units.c[name]).label(name) for name in names]
        ends = [func.min(units.c.first_at).label("first_at"), func.max(units.c.last_at).label("last_at")]
        wanted = (
            select(units.c.arm, func.count().label("units"), *totals, *ends).where(self._ours).group_by(units.c.arm)
        )
        rows = [dict(row._mapping) for row in self._connection.execute(wanted)]
        return {row.pop("arm"): row for row in rows}

    def units_until(self, moment: float | None) -> dict[str, int]:
        """{arm: units that came until then}; all without a moment."""
        wanted = select(units.c.arm, func.count()).where(self._ours).group_by(units.c.arm)
        if moment is not None:
            wanted = wanted.where(units.c.first_at < moment)
        return {arm: count for arm, count in self._connection.execute(wanted).tuples()}  # noqa: C416

    def crossed(self) -> int:
        """Units that were seen in more than one arm."""
        twice = select(units.c.unit).where(self._ours).group_by(units.c.unit).having(func.count() > 1).subquery()
        return int(self._connection.execute(select(func.count()).select_from(twice)).scalar_one())

    def measures(self, wanted: Sequence[Measure], course: Course | None = None) -> dict[str, dict[str, Sums]]:
        """{measure: {arm: sums}}; with a course, arrays over its steps."""
        found = self._added(
            units,
            {m.name: self._ratio(units.c[m.numerator], units.c[m.denominator]) for m in wanted},
            course,
            self._ours,
        )
        return {m.name: found[m.name] for m in wanted}

    def outcome(self, metric: str, course: Course | None = None) -> dict[str, Sums]:
        """{arm: sums} of an outcome, its values from before a unit came being its covariate.

        metric: a name, or `name=label`: the share of that label.

        Outcomes with a ticket know their arm and came after their unit. Those of a unit alone are joined with it; what is older
        than its first exposure is its past. The second kind takes longer, and is left out where there is none.
        """
        name, _, label = metric.partition("=")
        value = case((outcomes.c.label == label, 1.0), else_=0.0) if label else outcomes.c.value
        of_metric = and_(self._of_version(), outcomes.c.metric == name)
        alone = select(exists().where(of_metric, outcomes.c.arm == ""))
        if self._connection.execute(alone).scalar_one():
            each = self._with_past(value, of_metric)
            moments = [*self._ratio(each.c.x, each.c.d), *self._past(each)]
        else:
            each = self._ticketed(value, of_metric).subquery()
            moments = self._ratio(each.c.x, each.c.d)
        return self._added(each, {metric: moments}, course)[metric]

    def outcomes(self) -> dict[str, OutcomeFacts]:
        """{metric, or metric=label}, by name."""
        o, key = outcomes.c, (outcomes.c.metric, outcomes.c.label)
        other = self._sum(case((o.value.in_((0.0, 1.0)), 0), else_=1))
        every = select(*key, func.count(), other).where(self._of_version()).group_by(*key).order_by(*key)
        seen = exists().where(self._ours, units.c.unit == o.unit)
        nobody = select(*key, func.count()).where(self._of_version(), o.arm == "", ~seen).group_by(*key)
        lost = {(metric, label): count for metric, label, count in self._connection.execute(nobody)}
        return {
            f"{metric}={label}" if label else metric: OutcomeFacts(count, lost.get((metric, label), 0), not others)
            for metric, label, count, others in self._connection.execute(every)
        }

    def histogram(self, latency: str) -> dict[str, Histogram]:
        """{arm: its latencies}."""
        h = histograms.c
        wanted = select(h.arm, h.bin, h.count).where(
            h.experiment == self._experiment, h.version == self._version, h.measure == latency
        )
        bins: dict[str, dict[int, int]] = {}
        for arm, number, count in self._connection.execute(wanted):
            bins.setdefault(arm, {})[number] = count
        return {arm: _histogram(found) for arm, found in bins.items()}

    def clusters(self, latency: str, measured: Mapping[str, Histogram]) -> dict[str, Clusters]:
        """{arm: how its latencies lie within units}."""
        n, s = (self._number(units.c[f"{latency}_{part}"]) for part in ("n", "log"))
        sums = [self._sum(value) for value in (n, n * n, s, s * s / n)]
        wanted = select(units.c.arm, func.count(), *sums).where(self._ours, n > 0).group_by(units.c.arm)
        found = {}
        for arm, count, *values in self._connection.execute(wanted):
            if arm in measured:
                total, squares, logs, between = map(float, values)
                found[arm] = Clusters(count, total, squares, logs, between, measured[arm].square_logs())
        return found

    # -- SQL ------------------------------------------------------------------------------------------------------------

    def _added(
        self, source: FromClause, moments: Mapping[str, Sequence[Column]], course: Course | None, *where: Column
    ) -> dict[str, dict[str, Sums]]:
        """The sums of each moment over the rows of `source`, by arm, and by step where there is a course."""
        keys: list[Label[Any]] = [source.c.arm.label("of_arm")]
        if course is not None:
            keys.append(self._floor((source.c.first_at - course.start) / course.step).label("step"))
        totals = [self._sum(value) for values in moments.values() for value in values]
        # By name: an expression with parameters in it is not the same twice for PostgreSQL.
        names: list[Column] = [literal_column(key.name) for key in keys]
        rows = self._connection.execute(select(*keys, func.count(), *totals).where(*where).group_by(*names)).all()
        arms = sorted({row[0] for row in rows})
        found: dict[str, dict[str, Sums]] = {}
        at = len(keys) + 1
        for name, values in moments.items():
            found[name] = {}
            for arm in arms:
                mine = [row for row in rows if row[0] == arm]
                table = np.zeros((course.steps if course else 1, 1 + len(values)))
                for row in mine:
                    step = min(max(int(row[1]), 0), course.steps - 1) if course else 0
                    table[step] += [row[len(keys)], *row[at : at + len(values)]]
                found[name][arm] = Sums(*(table.T if course else table[0]))
            at += len(values)
        return found

    def _ratio(self, x: Column, d: Column) -> list[Column]:
        x, d = self._number(x), self._number(d)
        return [x, d, x * x, d * d, x * d]

    def _past(self, each: Subquery) -> list[Column]:
        x, d, known = self._number(each.c.x), self._number(each.c.d), each.c.past.is_not(None)
        c = func.coalesce(each.c.past, 0.0)
        m = case((known, 1.0), else_=0.0)
        return [m, c, c * c, c * x, c * d, m * x, m * d]

    def _ticketed(self, value: Column, of_metric: Column) -> Select[Any]:
        """A row for each unit: arm, unit, first_at (of its outcomes), x (their sum), d (how many)."""
        o = outcomes.c
        sums = [func.sum(value).label("x"), func.sum(literal(1.0, Double)).label("d")]
        wanted = select(o.arm, o.unit, func.min(o.at).label("first_at"), *sums)
        return wanted.where(of_metric, o.arm != "").group_by(o.arm, o.unit)

    def _with_past(self, value: Column, of_metric: Column) -> Subquery:
        """The same, of outcomes without a ticket too, with `past`: the mean of what came before the unit, NULL without any."""
        o, zero = outcomes.c, literal(0.0, Double)
        ticketed = self._ticketed(value, of_metric).add_columns(zero.label("past_x"), zero.label("past_d"))
        before = o.at < units.c.first_at
        alone = (
            select(
                units.c.arm,
                o.unit,
                func.min(case((before, None), else_=o.at)),
                func.sum(case((before, 0.0), else_=value)),
                func.sum(case((before, 0.0), else_=1.0)),
                func.sum(case((before, value), else_=0.0)),
                func.sum(case((before, 1.0), else_=0.0)),
            )
            .join_from(outcomes, units, and_(self._ours, units.c.unit == o.unit))
            .where(of_metric, o.arm == "")
            .group_by(units.c.arm, o.unit)
        )
        both = union_all(ticketed, alone).subquery()
        x, d, past_x, past_d = (func.sum(both.c[name]) for name in ("x", "d", "past_x", "past_d"))
        past = past_x / func.nullif(past_d, 0.0)
        wanted = select(
            both.c.arm, func.min(both.c.first_at).label("first_at"), x.label("x"), d.label("d"), past.label("past")
        )
        return wanted.group_by(both.c.arm, both.c.unit).having(d > 0).subquery()

    def _of_version(self) -> Column:
        versions = outcomes.c.version.in_((0, *self._versions))
        return and_(outcomes.c.experiment == self._experiment, versions, outcomes.c.counted)

    def _number(self, column: Column) -> Column:
        """As a float: products of whole numbers can be too large for one. SQLite makes floats of those by itself."""
        return column if self._sqlite else cast(column, Double)

    def _sum(self, value: Column) -> Column:
        """A sum that is a float, and 0 where there is nothing."""
        return func.total(value) if self._sqlite else func.coalesce(func.sum(cast(value, Double)), 0.0)

    def _floor(self, value: Column) -> Column:
        """Of what is not negative; PostgreSQL's cast rounds."""
        return cast(value if self._sqlite else func.floor(value), Integer)


def _histogram(bins: Mapping[int, int]) -> Histogram:
    first, last = min(bins), max(bins)
    counts = np.zeros(last - first + 1)
    for number, count in bins.items():
        counts[number - first] = count
    return Histogram(np.exp(np.arange(first, last + 2) * WIDTH), counts)
