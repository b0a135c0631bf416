# SPDX-License-Identifier: Apache-2.0
"""The store, in SQLite and in a real PostgreSQL: what is written is there once, whole, and added up."""

import multiprocessing
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import func, select, update

from tests.experiment_records import exposure, outcome, pair
from vllm_merge.errors import MergeError, UserInputError
from vllm_merge.experiments import database, tables
from vllm_merge.experiments.records import Decision
from vllm_merge.experiments.store import Store, StoreError


@pytest.fixture
def store(each_store):
    return each_store


def rows_of(store: Store, table) -> list[dict]:
    with store.reading() as connection:
        return [dict(row._mapping) for row in connection.execute(select(table))]


def test_exposures_are_kept_whole(store):
    given = [exposure(1), exposure(2, "b", first_token=None, unit="", error="stream_error", streaming=False)]
    store.add_exposures(given)
    found = {row["id"]: row for row in rows_of(store, tables.exposures)}
    assert [found[one.id] for one in given] == [vars(one) for one in given]


def test_an_exposure_counts_once_however_often_it_is_written(store):
    store.add_exposures([exposure(1), exposure(2)])
    store.add_exposures([exposure(2), exposure(3, unit=f"{2:032x}", at=1_800_000_000.0)])
    assert len(rows_of(store, tables.exposures)) == 3
    units = {row["unit"]: row for row in rows_of(store, tables.units)}
    assert {unit: row["requests"] for unit, row in units.items()} == {f"{1:032x}": 1, f"{2:032x}": 2}
    second = units[f"{2:032x}"]
    assert (second["first_at"], second["last_at"]) == (1_700_000_002.0, 1_800_000_000.0)
    assert (second["tokens"], second["answers"], second["seconds_n"], second["seconds_sum"]) == (40, 2, 2, 1.0)
    assert sum(row["count"] for row in rows_of(store, tables.histograms)) == 9  # three latencies of three answers


@pytest.mark.parametrize(
    ("changes", "errors", "refusals", "answers", "latencies"),
    [
        ({}, 0, 0, 1, 3),
        ({"status": 500, "error": "failed"}, 1, 0, 0, 0),
        ({"error": "stream_error"}, 1, 0, 0, 0),
        ({"error": "client_left"}, 0, 0, 1, 3),
        ({"status": 422, "error": "http_422", "completion_tokens": None}, 0, 0, 0, 0),
        ({"finish": "content_filter"}, 0, 1, 1, 3),
        ({"refused": True}, 0, 1, 1, 3),
        ({"first_token": None, "gap_mean": None}, 0, 0, 1, 1),
    ],
)
def test_what_counts_as_what(store, changes, errors, refusals, answers, latencies):
    store.add_exposures([exposure(1, **changes)])
    (unit,) = rows_of(store, tables.units)
    assert (unit["errors"], unit["refusals"], unit["answers"]) == (errors, refusals, answers)
    assert sum(row["count"] for row in rows_of(store, tables.histograms)) == latencies


@pytest.mark.parametrize(
    "reason", ["TARGETING_MATCH: forced", "DEFAULT: holdout", "STATIC: promoted", "DISABLED", "ERROR"]
)
def test_arms_that_nobody_drew_are_kept_and_not_counted(store, reason):
    store.add_exposures([exposure(1, reason=reason)])
    assert len(rows_of(store, tables.exposures)) == 1
    assert rows_of(store, tables.units) == []


def test_requests_without_a_unit_are_units(store):
    store.add_exposures([exposure(1, unit=""), exposure(2, unit="")])
    assert {row["unit"] for row in rows_of(store, tables.units)} == {f"{1:032x}", f"{2:032x}"}


def test_an_outcome_is_there_once(store):
    assert store.add_outcomes([outcome(1), outcome(2), outcome(1, 0.0)]) == [True, True, False]
    assert store.add_outcomes([outcome(2, 0.0), outcome(3)]) == [False, True]
    assert {row["id"]: row["value"] for row in rows_of(store, tables.outcomes)} == {
        "outcome 1": 1.0,
        "outcome 2": 1.0,
        "outcome 3": 1.0,
    }


def test_definitions_have_versions(store):
    assert store.definition("ab") is None
    first = store.define("ab", {"arms": {"a": 1}})
    assert store.define("ab", {"arms": {"a": 1}}) == first
    second = store.define("ab", {"arms": {"a": 2}})
    assert (first.version, second.version) == (1, 2)
    assert store.define("ab", {"arms": {"a": 1}}).version == 3  # back again is a change too
    assert store.definition("ab", 2) == second
    store.define("other", {})
    assert [(found.experiment, found.version) for found in store.definitions()] == [("ab", 3), ("other", 1)]


def test_replicas_that_start_together_get_one_version(store_url, store):
    others = [Store.open(store_url) for _ in range(6)]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda one: one.define("ab", {"arms": {"a": 1}}), others))
    for one in others:
        one.close()
    assert {definition.version for definition in found} == {1}
    assert len(rows_of(store, tables.definitions)) == 1


def test_decisions_are_in_order_and_a_breach_is_decided_once(store):
    breach = Decision("ab", 1, "breach", 1.0, "b", "errors", "too many")
    assert store.decide(breach)
    assert not store.decide(replace(breach, at=2.0, reason="seen by another replica"))
    assert store.decide(replace(breach, guardrail="length"))
    assert store.decide(replace(breach, version=2))
    assert store.decide(Decision("ab", 2, "stop", 3.0))
    assert store.decide(Decision("ab", 2, "stop", 4.0))
    assert store.decide(Decision("other", 1, "promote", 5.0, "b"))
    found = store.decisions("ab")
    assert [(d.kind, d.version, d.at) for d in found] == [
        ("breach", 1, 1.0),
        ("breach", 1, 1.0),
        ("breach", 2, 1.0),
        ("stop", 2, 3.0),
        ("stop", 2, 4.0),
    ]
    assert found[0].reason == "too many"
    assert [d.number for d in found] == sorted(d.number for d in found)
    assert len(store.decisions()) == 6


def _write(url: str, first: int) -> None:
    store = Store.open(url)
    for start in range(first, first + 100, 10):
        store.add_exposures([exposure(i, unit=f"{i % 7:032x}") for i in range(start, start + 10)])
        store.add_outcomes([outcome(i) for i in range(start, start + 10)])
    store.close()


def test_several_processes_write_to_one_store(store_url, store):
    """Each writes what it has, and to the same rows of units, in whatever order: nothing is lost, nobody waits for ever."""
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write, args=(store_url, 100 * i)) for i in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(120)
        assert writer.exitcode == 0
    assert len(rows_of(store, tables.exposures)) == len(rows_of(store, tables.outcomes)) == 200
    assert sum(row["requests"] for row in rows_of(store, tables.units)) == 200
    assert sum(row["count"] for row in rows_of(store, tables.histograms)) == 600


def test_a_newer_schema_is_refused(store_url, store):
    with store.writing() as connection:
        connection.execute(update(tables.about).values(schema_version=tables.SCHEMA_VERSION + 1))
    with pytest.raises(UserInputError, match=r"newer vllm-merge \(schema 3; this one knows 2\)"):
        Store.open(store_url)


def test_a_store_of_the_first_schema_gets_what_is_missing(store_url, store):
    store.add_exposures([exposure(1)])
    tables.pairs.drop(store.engine)
    with store.writing() as connection:
        connection.execute(update(tables.about).values(schema_version=1))
    opened = Store.open(store_url, create=False)
    opened.add_pairs([pair(1), pair(1), pair(1, shadow="c")])
    assert [row["shadow"] for row in rows_of(opened, tables.pairs)] == ["b", "c"]
    assert [row["id"] for row in rows_of(opened, tables.exposures)] == [exposure(1).id]
    assert rows_of(opened, tables.about) == [{"schema_version": tables.SCHEMA_VERSION}]
    opened.close()


def test_reading_makes_no_store(store_url, tmp_path):
    with pytest.raises(UserInputError, match=r"no store of experiments|is not a store"):
        Store.open(store_url, create=False)
    assert not list(tmp_path.glob("*.sqlite*"))


def test_a_failure_changes_nothing(store):
    """The second row breaks in the middle of a batch."""
    with pytest.raises(Exception, match=r"NOT NULL|null value"):
        store.add_exposures([exposure(1), exposure(2, arm=None)])
    assert rows_of(store, tables.exposures) == rows_of(store, tables.units) == []


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("relative.sqlite", f"{Path.cwd()}/relative.sqlite"),
        ("sqlite:////abs/x.db", "/abs/x.db"),
        ("postgresql://u:secret@h/d", "postgresql+psycopg://u:***@h/d"),
        ("postgres://u:secret@h/d", None),
        ("mysql://u:secret@h/d", None),
        ("sqlite://", None),
        ("http://[", None),
    ],
)
def test_where_a_store_may_be(given, found):
    if found is not None:
        assert database.described(database.store_url(given)) == found
        return
    with pytest.raises(UserInputError, match="VLLM_MERGE_STORE") as error:
        database.store_url(given)
    assert "secret" not in str(error.value)


def test_the_default_is_in_the_users_state_folder(tmp_path):
    here = database.store_url(None, {"XDG_STATE_HOME": str(tmp_path)})
    assert here.database == str(tmp_path / "vllm-merge" / "experiments.sqlite")
    assert database.store_url(None, {"VLLM_MERGE_STORE": "/a/b.sqlite"}).database == "/a/b.sqlite"


def test_a_file_that_is_no_database_is_named(tmp_path):
    path = tmp_path / "x.sqlite"
    path.write_text("something else, and long enough to be looked at" * 100)
    with pytest.raises(MergeError, match=r"x\.sqlite, cannot be used: file is not a database"):
        Store.open(str(path))


def test_a_server_that_is_not_there_is_named():
    with pytest.raises(MergeError, match="cannot be used"):
        Store.open("postgresql://nobody:secret@127.0.0.1:1/none")


def test_sqlite_is_written_ahead_and_synced(tmp_path):
    store = Store.open(str(tmp_path / "x.sqlite"))
    with store.reading() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2
    store.close()


def test_a_locked_database_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.1)
    store = Store.open(str(tmp_path / "x.sqlite"))
    blocking = sqlite3.connect(tmp_path / "x.sqlite", isolation_level=None)
    blocking.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreError, match="database is locked"):
        store.add_outcomes([outcome(1)])
    blocking.execute("ROLLBACK")
    assert store.add_outcomes([outcome(1)]) == [True]
    with store.reading() as connection:
        assert connection.execute(select(func.count()).select_from(tables.outcomes)).scalar() == 1
    blocking.close()
    store.close()
