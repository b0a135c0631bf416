# SPDX-License-Identifier: Apache-2.0
"""vllm-merge convert: what it prints and writes, and how it ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vllm_merge.cli.app import app, main
from vllm_merge.recipe_files import load_recipes

CALL = {"adapters": ["sql", "code"], "weights": [0.6, 0.4], "combination_type": "cat"}


@pytest.fixture
def call(tmp_path: Path) -> Path:
    file = tmp_path / "call.json"
    file.write_text(json.dumps(CALL), encoding="utf-8")
    return file


def test_the_recipe_is_printed(call: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["convert", str(call), "--adapter", "sql=./a", "--name", "both"])
    assert result.exit_code == 0, result.output
    (tmp_path / "recipe.yaml").write_text(result.stdout, encoding="utf-8")
    file = load_recipes(tmp_path / "recipe.yaml")
    assert file.recipes["both"].merge_method == "task_arithmetic"
    assert file.adapters["sql"].path == str(tmp_path / "a")
    assert "# - the path of adapter 'code' is a guess" in result.stdout


def test_the_recipe_is_written_once(call: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "recipe.yaml"
    result = CliRunner().invoke(app, ["convert", str(call), "-o", str(output)])
    assert result.exit_code == 0, result.output
    assert list(load_recipes(output).adapters) == ["sql", "code"]
    with pytest.raises(SystemExit) as caught:
        main(["convert", str(call), "-o", str(output)])
    assert caught.value.code == 2
    assert "is there already; name a new file" in capsys.readouterr().err


def test_json(call: Path) -> None:
    result = CliRunner().invoke(app, ["convert", str(call), "--json", "--adapter", "sql=/a", "--adapter", "code=/b"])
    facts = json.loads(result.stdout)
    assert facts["recipe"]["adapters"] == {"sql": {"path": "/a"}, "code": {"path": "/b"}}
    assert facts["notes"] == []


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        ("{}", [], "is in no format that is known by its keys"),
        ("{}", ["--from", "peft"], "adapters: is empty; expected a list"),
        (json.dumps(CALL), ["--adapter", "sql"], "--adapter sql: allowed is NAME=PATH"),
        (json.dumps(CALL), ["--name", "a b"], "the name of the recipe is 'a b'"),
        ("[1", [], "not valid YAML"),
    ],
)
def test_what_is_wrong(
    content: str, arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "call.json"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(SystemExit) as caught:
        main(["convert", str(file), *arguments])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
