# SPDX-License-Identifier: Apache-2.0
"""The writer: what is handed over is written by itself, and nobody waits for a database that does not answer."""

import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time

import pytest
from sqlalchemy import func, select

from tests.experiment_records import exposure
from vllm_merge.experiments import database, tables, writer
from vllm_merge.experiments.store import Store, StoreError
from vllm_merge.experiments.writer import Writer

PATIENCE = 60.0


def count(store: Store) -> int:
    with store.reading() as connection:
        return int(connection.execute(select(func.count()).select_from(tables.exposures)).scalar_one())


def written(store: Store) -> int:
    """`count`, as far as the database answers: a process that writes may keep it for as long as the machine is busy."""
    try:
        return count(store)
    except StoreError:
        return 0


def until(condition) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it never came about"
        time.sleep(0.01)


def test_what_is_put_is_written_by_itself(store):
    made = Writer(store)
    for number in range(1200):
        made.put(exposure(number))
    until(lambda: made.written == 1200)
    assert (made.waiting, made.dropped, count(store)) == (0, 0, 1200)
    made.close()


def test_closing_writes_what_waits(store):
    made = Writer(store)
    for number in range(700):
        made.put(exposure(number))
    made.close(PATIENCE)
    assert (made.written, count(store)) == (700, 700)
    made.put(exposure(701))
    assert made.dropped == 1


def test_a_locked_database_holds_nobody_up_and_loses_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.05)
    store = Store.open(str(tmp_path / "x.sqlite"))
    blocking = sqlite3.connect(tmp_path / "x.sqlite", isolation_level=None)
    blocking.execute("BEGIN IMMEDIATE")
    made = Writer(store, queue=100)
    done = threading.Event()

    def put():
        for number in range(150):
            made.put(exposure(number))
        done.set()

    threading.Thread(target=put, daemon=True).start()
    assert done.wait(PATIENCE)  # while the lock is held: nobody waits for it
    assert (made.written, made.waiting, made.dropped) == (0, 100, 50)
    blocking.execute("ROLLBACK")
    until(lambda: made.written == 100)
    assert count(store) == 100
    made.close()
    blocking.close()


def test_one_wrong_row_does_not_hold_up_the_others(store):
    made = Writer(store)
    for number in range(20):
        made.put(exposure(number, arm=None) if number == 7 else exposure(number))
    until(lambda: made.written + made.dropped == 20)
    assert (made.written, made.dropped, count(store)) == (19, 1, 19)
    made.close()


def test_a_failing_store_is_said_once_and_tried_again(caplog, monkeypatch):
    monkeypatch.setattr(writer, "FLUSH_SECONDS", 0.001)

    class Failing:
        calls = 0

        def add_exposures(self, batch):
            self.calls += 1
            if self.calls < 4:
                raise StoreError("it is gone")

    made = Writer(Failing())
    made.put(exposure(1))
    until(lambda: made.written == 1)
    made.close()
    said = [record.message for record in caplog.records]
    assert said == ["exposures wait: it is gone", "exposures are written again; 0 were dropped so far"]


def test_old_rows_go_by_themselves(tmp_path):
    store = Store.open(str(tmp_path / "x.sqlite"))
    store.add_exposures([exposure(1, at=1.0), exposure(2, at=time.time())])
    made = Writer(store, keep_days=30)
    until(lambda: count(store) == 1)
    made.close()


KILLED = """
    import sys, time
    from tests.experiment_records import exposure
    from vllm_merge.experiments.store import Store
    from vllm_merge.experiments.writer import Writer

    made = Writer(Store.open(sys.argv[1]))
    number = 0
    while True:
        made.put(exposure(number))
        print(f"{number} {time.monotonic()}", flush=True)
        number += 1
        time.sleep(0.002)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL here")
def test_a_killed_process_loses_only_what_had_just_come(tmp_path):
    """Everything that was handed over before the last commit is there. How long ago that is, depends on the machine: what is
    lost is the end of what was put, without a hole.
    """
    path = tmp_path / "x.sqlite"
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(path)]
    root = os.fspath(tmp_path.cwd())
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=root, env={**os.environ, "PYTHONPATH": root}
    ) as child:
        for line in child.stdout:
            if int(line.split()[0]) == 500:
                break
        assert child.poll() is None, "the process ended by itself; it has said why"
        store = Store.open(str(path), create=False)
        until(lambda: written(store) >= 300)
        child.send_signal(signal.SIGKILL)
        child.wait(PATIENCE)
    with store.reading() as connection:
        ids = [int(row, 16) for row in connection.execute(select(tables.exposures.c.id)).scalars()]
        units = connection.execute(select(func.sum(tables.units.c.requests))).scalar()
    assert sorted(ids) == list(range(len(ids)))
    assert len(ids) >= 300
    assert units == len(ids)  # the sums were committed with the rows
