# SPDX-License-Identifier: Apache-2.0
"""`serve` refuses a recipe whose measured safety is under its floor: it has no artifact, and says why."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.conftest import DEMO
from vllm_merge.adapters.catalogue import Catalogue
from vllm_merge.serving.names import resolve_names

FACTS = {"base_model_hash": "0" * 64, "dtype": "float32", "max_lora_rank": 64}
RECIPE = "{{merge_method: linear, adapters: [{{adapter: add}}]{more}}}"


def resolved(tmp_path: Path, safety: str):
    path = tmp_path / "r.yaml"
    path.write_text(
        f"version: 1\nadapters: {{add: {{path: {DEMO / 'adapters' / 'add'}}}}}\nrecipes:\n"
        f"  plain: {RECIPE.format(more='')}\n  r: {RECIPE.format(more=f', safety: {safety}')}\n"
        "  of-r: {merge_method: linear, adapters: [{adapter: r}]}\naliases: {best: r}\n",
        encoding="utf-8",
    )
    return resolve_names(path, FACTS, Catalogue(), {})


@pytest.mark.parametrize("name", ["r", "best"])
def test_a_refused_recipe_has_no_artifact(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    found = resolved(tmp_path, "{floor: 0.9, score: 0.5}")
    assert found.names[name].digest is None
    assert re.match(r"recipe 'r' is refused: its safety score of 0.5 is under its floor", found.names[name].reason)
    assert found.names["plain"].digest is not None
    assert "its safety score of 0.5 is under its floor of 0.9" in caplog.text


def test_the_score_changes_no_digest(tmp_path: Path) -> None:
    good = resolved(tmp_path, "{floor: 0.9, score: 0.95}")
    assert good.names["r"].digest == good.names["plain"].digest is not None
    assert not good.names["r"].reason
