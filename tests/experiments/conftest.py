# SPDX-License-Identifier: Apache-2.0
"""Stores to test with: SQLite in a file, and a real PostgreSQL where one is installed."""

import os
import pwd
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from vllm_merge.experiments.store import Store


def _postgres_programs() -> Path | None:
    """The folder of initdb and pg_ctl: of Debian's packages, or on the path."""
    for folder in sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True):
        if (folder / "initdb").is_file():
            return folder
    found = shutil.which("initdb")
    return Path(found).parent if found else None


@pytest.fixture(scope="session")
def postgres_server():
    """The folder with the socket of a PostgreSQL server of our own. It does not run as root: then as user `postgres`."""
    programs = _postgres_programs()
    if programs is None:
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    as_user = []
    folder = Path(tempfile.mkdtemp(prefix="vmpg", dir="/tmp"))  # short: a socket's path is bounded
    if os.geteuid() == 0:
        try:
            pwd.getpwnam("postgres")
        except KeyError:
            pytest.skip("PostgreSQL does not run as root, and there is no user `postgres` to run it as")
        shutil.chown(folder, "postgres", "postgres")
        as_user = ["runuser", "-u", "postgres", "--"]
    data = folder / "data"

    def run(program: str, *arguments: str) -> None:
        command = [*as_user, str(programs / program), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=folder, check=False)
        assert done.returncode == 0, (command, done.stdout, done.stderr)

    run("initdb", "-D", str(data), "-U", "tester", "--auth=trust", "--encoding=UTF8", "--no-sync")
    options = f"-k {folder} -c listen_addresses='' -c fsync=off"
    run("pg_ctl", "-D", str(data), "-w", "-t", "60", "-l", str(folder / "log"), "-o", options, "start")
    try:
        yield folder
    finally:
        run("pg_ctl", "-D", str(data), "-m", "immediate", "stop")
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def postgres(postgres_server):
    """The URL of an empty database."""
    from pytest_postgresql.janitor import DatabaseJanitor

    folder = postgres_server
    with DatabaseJanitor(user="tester", host=str(folder), port=5432, dbname="experiments", version=15, password=None):
        yield f"postgresql://tester@/experiments?host={folder}"


@pytest.fixture(params=["sqlite", "postgres"])
def store_url(request, tmp_path):
    """The place of an empty store, in each kind of database."""
    if request.param == "sqlite":
        return str(tmp_path / "experiments.sqlite")
    return request.getfixturevalue("postgres")


@pytest.fixture
def each_store(store_url):
    """An empty store: the test runs once with each kind of database."""
    opened = Store.open(store_url)
    yield opened
    opened.close()


@pytest.fixture
def store(tmp_path):
    """An empty store in SQLite."""
    opened = Store.open(str(tmp_path / "experiments.sqlite"))
    yield opened
    opened.close()
