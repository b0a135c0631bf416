# SPDX-License-Identifier: Apache-2.0
"""The demo's model and a few of its adapters, and a way to run commands in this process."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.conftest import DEMO
from vllm_merge import Adapter
from vllm_merge.cli.app import main

pytest.importorskip("transformers")

Run = Callable[..., tuple[int, str, str]]
WriteRecipe = Callable[..., Path]
DATA = DEMO / "validation.jsonl"


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Run the command in this process: (exit code, stdout, stderr)."""

    def execute(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exited:
            main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        return int(exited.value.code or 0), out, err

    return execute


@pytest.fixture(scope="session")
def model():
    from vllm_merge.tuning.model import TuningModel

    return TuningModel(str(DEMO / "model"), "cpu", 12)


@pytest.fixture(scope="session")
def adapters() -> list[Adapter]:
    return [Adapter.from_peft(DEMO / "adapters" / name) for name in ("reverse", "upper", "sort")]


@pytest.fixture
def recipe(tmp_path: Path) -> WriteRecipe:
    """Write a recipe file over the demo's adapters: recipe(method, names, **keys of the recipe)."""

    def write(method: str, names: Sequence[str], **more: object) -> Path:
        document = {
            "version": 1,
            "base_model": str(DEMO / "model"),
            "adapters": {name: {"path": str(DEMO / "adapters" / name)} for name in names},
            "recipes": {"r": {"merge_method": method, "adapters": [{"adapter": name} for name in names], **more}},
        }
        path = tmp_path / "r.yaml"
        path.write_text(json.dumps(document))  # JSON is YAML
        return path

    return write


@pytest.fixture
def prompts_file(tmp_path: Path) -> Callable[..., Path]:
    """Some validation prompts of the demo: prompts_file(tasks, count of each, keys to keep)."""

    def write(tasks: Sequence[str], count: int, keys: Sequence[str] = ("task", "prompt", "answer")) -> Path:
        rows = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]
        kept = [row for task in tasks for row in [r for r in rows if r["task"] == task][:count]]
        path = tmp_path / "prompts.jsonl"
        path.write_text("".join(json.dumps({key: row[key] for key in keys}) + "\n" for row in kept))
        return path

    return write
