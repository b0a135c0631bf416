# SPDX-License-Identifier: Apache-2.0
"""The comparison with other programs: its arithmetic, its recorded part, and that docs/methods/choosing.md has what was measured."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "methods" / "choosing.md"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    names = ("peers_compare", "peers_cases", "peers_run")
    modules: dict[str, ModuleType] = {name.removeprefix("peers_"): importlib.import_module(name) for name in names}
    return SimpleNamespace(**modules)


def test_a_difference_counts_modules_that_one_of_them_lacks(script: SimpleNamespace) -> None:
    theirs = {"q": torch.tensor([[3.0, 0.0]]), "v": torch.tensor([[4.0]])}
    assert script.compare.difference(theirs, theirs) == 0
    assert script.compare.difference({"q": theirs["q"]}, theirs) == pytest.approx(4 / 5)
    assert script.compare.difference({**theirs, "k": torch.tensor([[5.0]])}, theirs) == pytest.approx(1)


def test_recorded_results_are_met(script: SimpleNamespace) -> None:
    rows = list(script.compare.golden_rows(script.cases.GOLDEN))
    assert {row["peer"] for row in rows} == {"LoRAX", "LoraHub", "KnOTS"}
    assert all(row["converted_difference"] <= script.compare.SAME for row in rows)
    assert all(row["default_difference"] > 0.1 for row in rows if row["peer"] != "KnOTS")
    assert all(row["source"].endswith("recorded") for row in rows)


def test_recorded_results_stand_in_for_mergekit(script: SimpleNamespace) -> None:
    assert script.run.Mergekit.found("no-such-command", script.compare.DEMO / "model") is None
    rows = list(script.compare.golden_rows(tuple(case for case in script.cases.MERGEKIT if case.recorded)))
    assert len(rows) >= 8
    assert all(row["converted_difference"] <= script.compare.SAME for row in rows)


def test_the_page_has_the_comparison(script: SimpleNamespace) -> None:
    rows = json.loads(script.compare.RESULTS.read_text(encoding="utf-8"))["rows"]
    page = PAGE.read_text(encoding="utf-8")
    assert script.compare.renewed(page, script.compare.table(rows)) == page
    of = {(row["peer"], row["method"]): row for row in rows if "rounded" not in row}
    assert {case.name for case in script.cases.PEFT} == {name for peer, name in of if peer == "PEFT"}
    for name in ("task_arithmetic", "ties", "sce", "ram", "model_stock", "nearswap", "nuslerp"):
        assert of["mergekit", name]["converted_difference"] <= script.compare.SAME
