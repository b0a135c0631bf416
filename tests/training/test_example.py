# SPDX-License-Identifier: Apache-2.0
"""examples/osrm runs from the tasks to the table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

for package in ("peft", "transformers", "accelerate"):
    pytest.importorskip(package)
SCRIPT = Path(__file__).parents[2] / "examples/osrm/run.py"


@pytest.mark.full
def test_example(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--steps", "2", "--prompts", "2", "--out", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith(("plain", "osrm"))]
    assert [row[0] for row in rows] == 5 * ["plain"] + 5 * ["osrm"]
    assert json.loads((tmp_path / "starts" / "osrm.json").read_text())["kind"] == "initialisation"
    for kind in ("plain", "osrm"):
        assert len(list((tmp_path / kind).glob("*/adapter_model.safetensors"))) == 3
