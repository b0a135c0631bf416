# SPDX-License-Identifier: Apache-2.0
"""Statements that SQLite and PostgreSQL spell alike, but SQLAlchemy's core lacks, and a quick way to run one for many rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from operator import itemgetter
from typing import Any

from sqlalchemy import Column, ColumnElement, Connection, Dialect, Insert, Table, case, insert
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.sql.compiler import SQLCompiler

Rows = Sequence[Mapping[str, Any]]


def insert_all(connection: Connection, table: Table, rows: Rows) -> None:
    """Insert rows that are new."""
    _run(connection, _compiled(connection.dialect, table), rows)


def insert_new(connection: Connection, key: Column[Any], rows: Rows) -> set[Any]:
    """Insert the rows that break no unique key into the table of `key`. Returns the keys of what was inserted."""
    if not rows:
        return set()
    statement = _dialects_own(connection.dialect, key.table).on_conflict_do_nothing().returning(key)
    return set(connection.execute(statement, list(rows)).scalars())


def add_up(connection: Connection, table: Table, rows: Rows, least: str = "", most: str = "") -> None:
    """Add each row's numbers to those of the row that has its primary key, or insert it.

    least, most: columns of which the smaller and the larger value stay. Each key may be there once. Rows are written in the order
    of their keys, so that two writers never wait for each other in a circle.
    """
    keys = [column.name for column in table.primary_key]
    ordered = sorted(rows, key=itemgetter(*keys))
    _run(connection, _compiled(connection.dialect, table, tuple(keys), least, most), ordered)


def _run(connection: Connection, statement: SQLCompiler, rows: Rows) -> None:
    """Hand the rows to the driver as they are: SQLAlchemy's own way takes several times as long for each."""
    if not rows:
        return
    names = statement.positiontup
    given = list(map(itemgetter(*names), rows)) if names is not None else list(rows)
    connection.exec_driver_sql(str(statement), given)


@cache
def _compiled(
    dialect: Dialect, table: Table, keys: tuple[str, ...] = (), least: str = "", most: str = ""
) -> SQLCompiler:
    """An insert of every column; with keys, one that adds to what is there."""
    statement: Insert = insert(table)
    if keys:
        own = _dialects_own(dialect, table)
        new = own.excluded
        sums: dict[str, ColumnElement[Any]] = {}
        for column in table.columns:
            value = new[column.name]
            if column.name in (least, most):
                replaced = value < column if column.name == least else value > column
                sums[column.name] = case((replaced, value), else_=column)
            elif column.name not in keys:
                sums[column.name] = column + value
        statement = own.on_conflict_do_update(index_elements=keys, set_=sums)
    compiled = statement.compile(dialect=dialect)
    assert isinstance(compiled, SQLCompiler)
    return compiled


def _dialects_own(dialect: Dialect, table: Table) -> sqlite.Insert | postgresql.Insert:
    return sqlite.insert(table) if dialect.name == "sqlite" else postgresql.insert(table)
