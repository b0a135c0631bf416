# SPDX-License-Identifier: Apache-2.0
"""Every example runs and prints what it is there to show. (examples/offline.py has a test of its own.)"""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

EXAMPLES = ROOT / "examples"


def output_of(server, *command: str) -> str:
    environment = {**os.environ, "VLLM_MERGE_URL": server.url if server else ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize(
    ("script", "shown"),
    [
        ("chat.py", ["weighted (weighted@", "assistant (weighted@", "reverse (reverse@", "enots"]),
        ("stream.py", ["aaeggr"]),
        ("many.py", ["weighted: STONE", "task-arithmetic: STONE", "knots-ties: STONE", "upper: STONE"]),
        (
            "adhoc.py",
            ["recipe (adhoc@", "STONE", "name: the same artifact", "listed: True", "error: column 29", "'reverse'?"],
        ),
        ("headers.py", ["asked for assistant answered by weighted@", "error: The model `asistant` does not exist"]),
    ],
)
def test_client_examples(demo_server, script, shown):
    printed = output_of(demo_server, sys.executable, str(EXAMPLES / script))
    assert all(text in printed for text in shown), printed


def test_curl_example(demo_server):
    models, completion, artifacts = output_of(demo_server, "bash", str(EXAMPLES / "ask.sh")).splitlines()
    assert "assistant" in {model["id"] for model in json.loads(models)["data"]}
    assert json.loads(completion)["choices"][0]["text"].strip().startswith("bcd")
    assert json.loads(artifacts)["data"][0]["bytes"] > 0


def test_export_example(tmp_path):
    printed = output_of(None, sys.executable, str(EXAMPLES / "export.py"), str(tmp_path / "merged"))
    assert "upper: stone ->STONE" in printed
    assert "sort: stone ->enost" in printed
    assert (tmp_path / "merged" / "adapter_model.safetensors").exists()


def test_every_example_is_run_by_a_test():
    run = {"adhoc.py", "chat.py", "stream.py", "many.py", "headers.py", "ask.sh", "export.py", "offline.py"}
    assert {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".sh")} == run
    readme = (EXAMPLES / "README.md").read_text()
    assert all(f"({name})" in readme for name in run)
