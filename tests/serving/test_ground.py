# SPDX-License-Identifier: Apache-2.0
"""The vLLM names that are relied on: all there, said clearly when one is not, and the same on the page."""

import dataclasses
import importlib
import importlib.util
from pathlib import Path

import pytest

from vllm_merge.serving import ground
from vllm_merge.serving.ground import GROUND, Ground, GroundMoved

PAGE = Path(__file__).resolve().parents[2] / ground.PAGE
IDS = [entry.names[0].rpartition(":")[2] for entry in GROUND]
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


@needs_vllm
@pytest.mark.parametrize("entry", GROUND, ids=IDS)
def test_the_ground_is_where_it_was(entry):
    assert entry.problem() is None


@needs_vllm
@pytest.mark.parametrize("entry", GROUND, ids=IDS)
def test_a_name_that_is_gone_is_named(entry, monkeypatch):
    for name in entry.names:
        module, _, path = name.partition(":")
        owner = importlib.import_module(module)
        *parents, last = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        for holder in getattr(owner, "__mro__", (owner,)):
            if last in vars(holder):
                monkeypatch.delattr(holder, last)
    problem = entry.problem()
    assert problem is not None
    assert all(name in problem for name in entry.names)
    assert "gone" in problem


@needs_vllm
@pytest.mark.parametrize("entry", [entry for entry in GROUND if entry.takes], ids=lambda entry: entry.names[0])
def test_a_parameter_that_is_gone_is_named(entry):
    changed = dataclasses.replace(entry, takes=(*entry.takes, "no_such_parameter"))
    assert changed.problem() == f"{entry.names[0]} no longer takes no_such_parameter"


@needs_vllm
@pytest.mark.parametrize("entry", [entry for entry in GROUND if entry.keeps], ids=lambda entry: entry.names[0])
def test_an_attribute_that_is_gone_is_named(entry):
    changed = dataclasses.replace(entry, keeps=(*entry.keeps, "no_such_attribute"))
    assert changed.problem() == f"{entry.names[0]} no longer has no_such_attribute"


def test_everything_that_moved_is_said_at_once(monkeypatch):
    gone = [Ground((f"json:Nothing{i}",), "a test", "read", "never", "load") for i in range(2)]
    monkeypatch.setattr(ground, "GROUND", (*gone, Ground(("json:loads",), "a test", "called", "never", takes=("s",))))
    with pytest.raises(GroundMoved, match=r"json:Nothing0 is gone; json:Nothing1 is gone\. Supported: vLLM 0\.26"):
        ground.check_ground("load")
    ground.check_ground("api")


def test_a_library_that_vllm_lacks_is_not_taken_for_moved_ground():
    assert Ground(("no_such_package.part:Name",), "", "", None).problem() == "no_such_package.part:Name is gone"


def test_the_page_shows_the_table():
    assert ground.tables() in PAGE.read_text(encoding="utf-8"), (
        f"put what `python -m vllm_merge.serving.ground` prints into {ground.PAGE}"
    )
