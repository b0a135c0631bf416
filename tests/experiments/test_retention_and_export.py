# SPDX-License-Identifier: Apache-2.0
"""What is old goes, what is asked for comes out as files."""

import csv
import json

import pyarrow.parquet
import pytest
from sqlalchemy import func, select

from tests.experiment_records import define, exposure, outcome, pair
from vllm_merge.errors import UserInputError
from vllm_merge.experiments import retention, tables
from vllm_merge.experiments.export import export
from vllm_merge.experiments.records import Decision
from vllm_merge.experiments.retention import delete_older

NOW = 1_800_000_000.0
DAY = 86_400.0


@pytest.fixture
def store(each_store):
    return each_store


def count(store, table) -> int:
    with store.reading() as connection:
        return int(connection.execute(select(func.count()).select_from(table)).scalar_one())


def test_what_is_old_goes_in_batches(store, monkeypatch):
    monkeypatch.setattr(retention, "BATCH", 3)
    define(store)
    store.decide(Decision("ab", 1, "stop", 1.0))
    old, new = NOW - 31 * DAY, NOW - 29 * DAY
    store.add_exposures([exposure(i, at=old) for i in range(10)] + [exposure(i, at=new) for i in range(10, 14)])
    store.add_exposures([exposure(20, at=new, unit=f"{0:032x}")])  # unit 0 came again
    store.add_outcomes([outcome(i, at=old) for i in range(5)] + [outcome(10, at=new)])
    store.add_pairs([pair(i, at=old) for i in range(2)] + [pair(2, at=new)])
    gone = delete_older(store, 30, NOW)
    assert gone == {"exposures": 10, "outcomes": 5, "pairs": 2, "units": 9, "histograms": 0}
    assert [count(store, table) for table in (tables.exposures, tables.outcomes, tables.units)] == [5, 1, 5]
    assert delete_older(store, 30, NOW) == {"exposures": 0, "outcomes": 0, "pairs": 0, "units": 0}
    last = delete_older(store, 1, NOW)
    assert (last["units"], count(store, tables.histograms)) == (5, 0)
    assert (count(store, tables.definitions), count(store, tables.decisions)) == (1, 1)


@pytest.mark.parametrize("form", ["parquet", "csv"])
def test_every_row_comes_out(store, tmp_path, form):
    define(store)
    define(store, "other")
    store.add_exposures([exposure(1), exposure(2, first_token=None, completion_tokens=None, error='a "word",\nmore')])
    store.add_exposures([exposure(3, experiment="other")])
    store.add_outcomes([outcome(1, 0.25, label="gut ✓")])
    store.add_pairs([pair(1), pair(3, experiment="other")])
    written = export(store, tmp_path / "out", form, "ab")
    assert {path.name: rows for path, rows in written.items()} == {
        f"exposures.{form}": 2,
        f"outcomes.{form}": 1,
        f"pairs.{form}": 1,
        f"units.{form}": 2,
        f"decisions.{form}": 0,
        f"definitions.{form}": 1,
    }
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(path.name for path in written)

    def read(table: str) -> list[dict]:
        path = tmp_path / "out" / f"{table}.{form}"
        if form == "parquet":
            return pyarrow.parquet.read_table(path).to_pylist()
        with path.open(newline="", encoding="utf-8") as stream:
            return list(csv.DictReader(stream))

    first, second = sorted(read("exposures"), key=lambda row: row["id"])
    assert first["artifact"] == "a@0123456789ab"
    assert float(first["first_token"]) == 0.1
    assert second["error"] == 'a "word",\nmore'
    assert second["first_token"] in (None, "")
    (came,) = read("outcomes")
    assert (float(came["value"]), came["label"]) == (0.25, "gut ✓")
    assert json.loads(read("definitions")[0]["document"])["experiment"]["primary"]["metric"] == "score"
    assert sum(export(store, tmp_path / "all", form).values()) == 3 + 1 + 2 + 3 + 0 + 2


def test_parquet_without_pyarrow_says_what_to_install(store, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(UserInputError, match=r"vllm-merge\[parquet\]"):
        export(store, tmp_path, "parquet")
    assert list(tmp_path.glob("*.parquet*")) == []
