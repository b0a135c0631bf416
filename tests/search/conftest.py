# SPDX-License-Identifier: Apache-2.0
"""A played server, examples for it, and a way to run commands in this process."""

import json

import pytest

from tests.cli.conftest import run  # noqa: F401  (a fixture)
from tests.search.played import ANSWER, PlayedMerges


@pytest.fixture
def merges():
    server = PlayedMerges()
    yield server
    server.close()


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "dev.jsonl"
    rows = [{"task": f"t{i % 2}", "prompt": f"question {i}", "answer": ANSWER} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
