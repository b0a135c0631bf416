# SPDX-License-Identifier: Apache-2.0
"""Sample texts of tasks: which are taken, how a template fills in, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vllm_merge import UserInputError
from vllm_merge.training.samples import read_samples


@pytest.fixture
def task(tmp_path: Path) -> Path:
    folder = tmp_path / "sums"
    folder.mkdir()
    lines = [json.dumps({"text": f"{i} + 1 =", "label": i + 1}) for i in range(50)]
    (folder / "train.jsonl").write_text("\n\n".join(lines))
    return folder


def test_a_folder_and_a_file(task: Path) -> None:
    every = read_samples(task, 100)
    assert (every.name, len(every.texts)) == ("sums", 50)
    some = read_samples(task, 10)
    assert len(set(some.texts)) == 10
    assert set(some.texts) < set(every.texts)
    assert read_samples(task, 10, seed=1).texts != some.texts == read_samples(task, 10).texts
    assert list(some.texts) != list(every.texts)[:10]  # files are often sorted
    file = task.parent / "other.jsonl"
    file.write_text('{"task": "x", "prompt": "hello", "answer": "y"}\n')
    assert read_samples(file, 5).texts == ["hello"]
    assert read_samples(file, 5).name == "other"


def test_template(task: Path) -> None:
    found = read_samples(task, 100, "Q: {text} A: {label} {}")
    assert "Q: 7 + 1 = A: 8 {}" in found.texts
    with pytest.raises(
        UserInputError, match=r"train.jsonl:1: --template asks for \{answer\}, and the line has text, label"
    ):
        read_samples(task, 10, "{text} {answer}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no samples"),
        ("\n  \n", "has no samples"),
        ("{", "t.jsonl:1: not valid JSON"),
        ('{"text": "a"}\n[1]', "t.jsonl:2: expected a JSON object, found list"),
        (
            '{"question": "a", "label": "b"}',
            "t.jsonl:1: expected text in 'text' or 'prompt', found the fields question, label",
        ),
        ('{"text": "  "}', "expected text in"),
        ('{"text": 3}', "expected text in"),
        ('{"text": "' + "a" * 2**20 + '"}', "longer than 1,048,576 bytes"),
    ],
)
def test_refusals(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "t.jsonl").write_text(content)
    with pytest.raises(UserInputError, match=message):
        read_samples(tmp_path / "t.jsonl", 10)


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match=r"has no train.jsonl; give a folder"):
        read_samples(tmp_path, 10)
    with pytest.raises(UserInputError, match="there is no such file or folder"):
        read_samples(tmp_path / "nothing", 10)
