# SPDX-License-Identifier: Apache-2.0
"""Merges in vLLM's offline `LLM` class, run as a program of its own."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT, servers


@pytest.fixture(scope="module")
def offline_report() -> list[list[str]]:
    """The lines of examples/offline.py: artifact, right or wrong, prompt and answer."""
    environment = {**os.environ, **servers.CPU_ENVIRONMENT}
    program = [sys.executable, str(ROOT / "examples" / "offline.py")]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [line.split("\t") for line in done.stdout.splitlines() if "@" in line and line.count("\t") == 2]


def test_the_llm_class_takes_merges_and_adapters(offline_report):
    merged = [row for row in offline_report if row[0].startswith("weighted@")]
    single = [row for row in offline_report if row[0].startswith("reverse@")]
    assert (len(merged), len(single)) == (8, 8)
    assert sum(row[1] == "right" for row in merged) >= 7
    assert next(row for row in single if row[2].startswith("reverse:"))[1] == "right"


def test_without_a_config_the_cure_is_said(monkeypatch):
    from vllm_merge.errors import UserInputError
    from vllm_merge.serving import merge_request

    monkeypatch.delenv("VLLM_MERGE_CONFIG", raising=False)
    with pytest.raises(UserInputError, match="set VLLM_MERGE_CONFIG to your recipe file before you create the LLM"):
        merge_request("assistant")
