# SPDX-License-Identifier: Apache-2.0
"""Opening the store's database: a file (SQLite) or a URL (PostgreSQL), with its schema made or checked."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, insert, inspect, make_url, select, update
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError

from vllm_merge.errors import MergeError, UserInputError
from vllm_merge.experiments.tables import SCHEMA_VERSION, about, metadata

STORE_VARIABLE = "VLLM_MERGE_STORE"
DEFAULT_FILE = Path("vllm-merge") / "experiments.sqlite"
BUSY_SECONDS = 10.0  # how long one writer waits for another
_LOCK_ID = 7_301_204_551  # of PostgreSQL's advisory lock around making the tables


def store_url(given: str | None = None, environment: Mapping[str, str] = os.environ) -> URL:
    """Where the store is: what was given, else VLLM_MERGE_STORE, else a file in the user's state folder.

    A path, `sqlite:///path` or `postgresql://…`. Raises UserInputError.
    """
    value = given or environment.get(STORE_VARIABLE)
    if not value:
        state = environment.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
        value = str(Path(state) / DEFAULT_FILE)
    if "://" not in value:
        return URL.create("sqlite", database=str(Path(value).expanduser().absolute()))
    try:
        url = make_url(value)
    except ArgumentError:
        raise _wrong("is not a database URL") from None
    backend = url.get_backend_name()
    if backend == "sqlite" and url.database not in (None, "", ":memory:"):
        return url.set(database=str(Path(str(url.database)).absolute()), query={})
    if backend == "postgresql":
        return url.set(drivername="postgresql+psycopg")
    raise _wrong(f"is a {backend} database without a file" if backend == "sqlite" else f"is of {backend}")


def _wrong(what: str) -> UserInputError:
    """The value itself is not repeated: it may hold a password."""
    return UserInputError(
        f"the store of experiments ({STORE_VARIABLE}) {what}; give the path of a file, which SQLite writes, "
        "or postgresql://USER:PASSWORD@HOST/DATABASE"
    )


def described(url: URL) -> str:
    """The store's place, for messages: never with its password."""
    return str(url.database) if url.get_backend_name() == "sqlite" else url.render_as_string(hide_password=True)


def open_engine(url: URL, *, create: bool) -> Engine:
    """An engine on a store whose schema is ours. create: make what is missing.

    Raises UserInputError where there is no store (and none shall be made), or one of a newer version; MergeError where the
    database cannot be reached.
    """
    sqlite = url.get_backend_name() == "sqlite"
    if sqlite:
        path = Path(str(url.database))
        if create:
            path.parent.mkdir(parents=True, exist_ok=True)
        elif not path.is_file():
            raise UserInputError(
                f"{path}: there is no store of experiments; {STORE_VARIABLE} or --store says where it is"
            )
    try:
        engine = create_engine(url, pool_pre_ping=not sqlite, **_options(sqlite))
    except ImportError:
        raise UserInputError(
            "psycopg is not installed, and a PostgreSQL store needs it; install it with `pip install 'vllm-merge[postgres]'`"
        ) from None
    if sqlite:
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    try:
        _check_schema(engine, described(url), create)
    except DBAPIError as error:
        engine.dispose()
        raise MergeError(f"the store of experiments, {described(url)}, cannot be used: {cause(error)}") from None
    except MergeError:
        engine.dispose()
        raise
    return engine


def _options(sqlite: bool) -> dict[str, Any]:
    if sqlite:
        return {"connect_args": {"timeout": BUSY_SECONDS, "check_same_thread": False}}
    wait = f"-c lock_timeout={BUSY_SECONDS:.0f}s -c statement_timeout=120s"
    return {"connect_args": {"connect_timeout": 10, "options": wait}}


def _prepare_sqlite(connection: Any, _: object) -> None:
    """WAL: readers and one writer do not wait for each other. FULL: what is committed survives a loss of power."""
    connection.isolation_level = None  # transactions begin where we say so
    for pragma in ("journal_mode = WAL", "synchronous = FULL", "temp_store = MEMORY", "cache_size = -65536"):
        connection.execute(f"PRAGMA {pragma}").close()


def _begin_sqlite(connection: Connection) -> None:
    """A writer takes the lock at once: one that reads first and writes later can be refused in the middle."""
    connection.exec_driver_sql("BEGIN IMMEDIATE" if connection.get_execution_options().get("writes") else "BEGIN")


@contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """A transaction that writes."""
    with engine.connect() as connection, connection.execution_options(writes=True).begin():
        yield connection


def _check_schema(engine: Engine, place: str, create: bool) -> None:
    """Read the schema's version, and make the tables that are missing. Processes that start together make them once."""
    with engine.connect() as connection:
        found = _schema_version(connection)
    if found is None and not create:
        raise UserInputError(f"{place}: is not a store of experiments; {STORE_VARIABLE} or --store says where it is")
    if found is None or found < SCHEMA_VERSION:
        with writing(engine) as connection:
            if engine.dialect.name == "postgresql":
                connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_LOCK_ID})")
            found = _schema_version(connection)
            if found is None or found < SCHEMA_VERSION:
                metadata.create_all(connection)
                newest = insert(about) if found is None else update(about)
                connection.execute(newest.values(schema_version=SCHEMA_VERSION))
                return
    if found > SCHEMA_VERSION:
        raise UserInputError(
            f"{place}: was written by a newer vllm-merge (schema {found}; this one knows {SCHEMA_VERSION}); upgrade it, "
            "or choose another store"
        )


def _schema_version(connection: Connection) -> int | None:
    if not inspect(connection).has_table(about.name):
        return None
    return int(connection.execute(select(about.c.schema_version)).scalar_one())


def cause(error: SQLAlchemyError) -> str:
    """The database's own words, in one line."""
    return " ".join(str(getattr(error, "orig", error)).split())
