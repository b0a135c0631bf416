# SPDX-License-Identifier: Apache-2.0
"""The store: where exposures, outcomes, definitions and decisions of experiments are written and read.

Several API processes and replicas write to one store. Its methods are synchronous and safe in any thread; a call that
returns has committed, and one that raises StoreError has changed nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from typing import Any

from sqlalchemy import Connection, Engine, Row, func, insert, select
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from vllm_merge.errors import MergeError
from vllm_merge.experiments import database
from vllm_merge.experiments.pairs import Pair
from vllm_merge.experiments.phases import phases
from vllm_merge.experiments.records import Decision, Definition, Exposure, Outcome
from vllm_merge.experiments.tables import decisions, definitions, exposures, outcomes, pairs
from vllm_merge.experiments.totals import add_to_totals
from vllm_merge.experiments.upsert import insert_all, insert_new

_MOST_TRIES = 20  # of processes that define an experiment at the same moment


class StoreError(MergeError):
    """The database did not do what was asked: it is locked, full, gone or out of reach. Asking again may help."""


class Store:
    """One store of experiments. Made by `open`."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.place = database.described(engine.url)
        self._phases: dict[tuple[str, int], int] = {}  # of definitions, which never change

    @classmethod
    def open(cls, url: str | None = None, *, create: bool = True) -> Store:
        """Open a path or URL (default: VLLM_MERGE_STORE, or the user's state folder), and make what is missing there.

        Raises UserInputError (a wrong URL, a newer schema, nothing there without `create`) or MergeError (out of reach).
        """
        return cls(database.open_engine(database.store_url(url), create=create))

    def close(self) -> None:
        self.engine.dispose()

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A transaction that reads. Raises StoreError for what the database refuses."""
        with self._translated(), self.engine.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction that writes: all of it or nothing. Raises StoreError."""
        with self._translated(), database.writing(self.engine) as connection:
            yield connection

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (DataError, IntegrityError):
            raise  # the row's fault: asking again does not help
        except (DBAPIError, PoolTimeout) as error:
            raise StoreError(f"the store of experiments, {self.place}: {database.cause(error)}") from error

    # -- what servers write ---------------------------------------------------------------------------------------------

    def add_exposures(self, batch: Sequence[Exposure]) -> None:
        """Write exposures and bring the totals up to date. Those that are there already change nothing."""
        first = {key: self.phase(*key) for key in {(exposure.experiment, exposure.version) for exposure in batch}}
        with self.writing() as connection:
            wanted = select(exposures.c.id).where(exposures.c.id.in_([exposure.id for exposure in batch]))
            there = set(connection.execute(wanted).scalars())
            fresh = list({exposure.id: exposure for exposure in batch if exposure.id not in there}.values())
            insert_all(connection, exposures, [vars(exposure) for exposure in fresh])
            add_to_totals(connection, fresh, first)

    def add_outcomes(self, batch: Sequence[Outcome]) -> list[bool]:
        """Write outcomes; they are on disk when this returns. For each, whether it was new: what is there under an id stays
        as it is.
        """
        with self.writing() as connection:
            fresh = insert_new(connection, outcomes.c.id, [vars(outcome) for outcome in batch])
        new = []
        for outcome in batch:
            new.append(outcome.id in fresh)
            fresh.discard(outcome.id)  # the same id again in this batch is not new
        return new

    def add_pairs(self, batch: Sequence[Pair]) -> None:
        """Write pairs. Those that are there already change nothing."""
        with self.writing() as connection:
            insert_new(connection, pairs.c.exposure, [vars(pair) for pair in batch])

    # -- definitions ----------------------------------------------------------------------------------------------------

    def define(self, experiment: str, document: Mapping[str, Any]) -> Definition:
        """The definition with this document: the newest one if it says the same, else a new version of it.

        Every replica that defines the same gets the same version.
        """
        for _ in range(_MOST_TRIES):
            newest = self.definition(experiment)
            if newest is not None and newest.document == document:
                return newest
            made = Definition(experiment, newest.version + 1 if newest else 1, time.time(), dict(document))
            try:
                with self.writing() as connection:
                    connection.execute(insert(definitions), asdict(made))
            except IntegrityError:
                continue  # another process was first: what did it say?
            return made
        raise StoreError(
            f"experiment {experiment}: its definition changes all the time; do replicas serve different files?"
        )

    def definition(self, experiment: str, version: int | None = None) -> Definition | None:
        """One version of a definition; the newest without `version`."""
        wanted = select(definitions).where(definitions.c.experiment == experiment)
        if version is not None:
            wanted = wanted.where(definitions.c.version == version)
        with self.reading() as connection:
            row = connection.execute(wanted.order_by(definitions.c.version.desc()).limit(1)).one_or_none()
        return Definition(**row._mapping) if row is not None else None

    def experiments(self) -> list[str]:
        """The name of every experiment, in order."""
        wanted = select(definitions.c.experiment).distinct().order_by(definitions.c.experiment)
        with self.reading() as connection:
            return list(connection.execute(wanted).scalars())

    def definitions(self) -> list[Definition]:
        """The newest definition of every experiment, by name."""
        newest = (
            select(definitions.c.experiment, func.max(definitions.c.version).label("version"))
            .group_by(definitions.c.experiment)
            .subquery()
        )
        joined = (definitions.c.experiment == newest.c.experiment) & (definitions.c.version == newest.c.version)
        with self.reading() as connection:
            rows = connection.execute(select(definitions).join(newest, joined).order_by(definitions.c.experiment)).all()
        return [Definition(**row._mapping) for row in rows]

    def phase(self, experiment: str, version: int) -> int:
        """The first version of those that share their units with this one (phases.py); itself where it is not defined."""
        if (experiment, version) not in self._phases:
            wanted = select(definitions).where(definitions.c.experiment == experiment).order_by(definitions.c.version)
            with self.reading() as connection:
                found = [Definition(**row._mapping) for row in connection.execute(wanted)]
            self._phases.update({(experiment, number): first for number, first in phases(found).items()})
        return self._phases.get((experiment, version), version)

    def versions(self, experiment: str, version: int) -> list[int]:
        """The versions that share their units with this one, itself among them."""
        first = self.phase(experiment, version)
        return [
            version for (name, version), phase in list(self._phases.items()) if (name, phase) == (experiment, first)
        ]

    # -- decisions ------------------------------------------------------------------------------------------------------

    def decide(self, decision: Decision) -> bool:
        """Write a decision. False where it is a breach that was written already: then nothing is changed."""
        same = [decision.experiment, str(decision.version), decision.arm, decision.guardrail]
        once = "\n".join(same) if decision.kind == "breach" else None
        row = {**_without_number(decision), "once": once}
        with self.writing() as connection:
            return bool(insert_new(connection, decisions.c.number, [row]))

    def decisions(self, experiment: str | None = None) -> list[Decision]:
        """The decisions about one experiment, or all, in the order in which they were made."""
        wanted = select(decisions).order_by(decisions.c.number)
        if experiment is not None:
            wanted = wanted.where(decisions.c.experiment == experiment)
        with self.reading() as connection:
            return [_decision(row) for row in connection.execute(wanted)]


def _without_number(decision: Decision) -> dict[str, Any]:
    return {name: value for name, value in asdict(decision).items() if name != "number"}


def _decision(row: Row[Any]) -> Decision:
    found = row._mapping
    return Decision(**{field.name: found[field.name] for field in fields(Decision)})
