# SPDX-License-Identifier: Apache-2.0
"""Prompt files: what is read, and every way to be wrong with its line."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from vllm_merge import UserInputError
from vllm_merge.tuning.data import PromptSet, read_prompts

LINES = (
    '{"prompt": "a ->", "answer": "A", "task": "upper"}\n'
    "\n"
    '{"prompt": "ab ->", "answer": "ba", "task": "reverse"}\n'
    '{"prompt": "c ->", "answer": "C", "task": "upper", "note": "passed over"}\n'
)


@pytest.fixture
def read(tmp_path: Path):
    def of(text: str, limit: int | None = None) -> PromptSet:
        path = tmp_path / "p.jsonl"
        path.write_text(text, encoding="utf-8")
        return read_prompts(path, limit)

    return of


def test_prompts_with_answers_and_tasks(read) -> None:
    found = read(LINES)
    assert [(p.prompt, p.answer, p.task, p.line) for p in found.prompts] == [
        ("a ->", "A", "upper", 1),
        ("ab ->", "ba", "reverse", 3),
        ("c ->", "C", "upper", 4),
    ]
    assert found.tasks == ("upper", "reverse")
    assert found.answered
    assert found.sha256 == hashlib.sha256(LINES.encode()).hexdigest()
    assert [p.line for p in found.of_task("upper")] == [1, 4]
    assert [p.line for p in found.first(1).prompts] == [1, 3]
    assert [p.line for p in read(LINES, limit=1).prompts] == [1, 3]


def test_prompts_alone(read) -> None:
    found = read('{"prompt": "a"}\n{"prompt": "b", "answer": null, "task": null}\n')
    assert found.tasks == (None,)
    assert not found.answered
    with pytest.raises(UserInputError, match=r"p.jsonl:1: 'answer' is missing, and --objective loss needs one"):
        found.need_answers("--objective loss")
    assert found.for_adapters(["a", "b"], "it") == (found, [])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no prompts; a line is"),
        ("\n \n", "has no prompts"),
        ("{", r"p.jsonl:1: not valid JSON"),
        ('"a"', r"p.jsonl:1: expected a JSON object, found str"),
        ('{"answer": "a"}', r"p.jsonl:1: 'prompt' is missing"),
        ('{"prompt": "a"}\n{"prompt": " "}', r"p.jsonl:2: 'prompt' is ' '; expected text that is not empty"),
        ('{"prompt": "a", "answer": 4}', r"p.jsonl:1: 'answer' is '4'; expected text"),
        ('{"prompt": "a", "task": ""}', r"p.jsonl:1: 'task' is ''; expected text"),
        ("[" * 100_000, r"p.jsonl:1: not valid JSON"),
    ],
)
def test_wrong_files(read, text: str, said: str) -> None:
    with pytest.raises(UserInputError, match=said):
        read(text)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match="cannot be read: No such file"):
        read_prompts(tmp_path / "none.jsonl")


def test_a_line_without_end(read) -> None:
    with pytest.raises(UserInputError, match=r"p.jsonl:1: the line is longer than 1,048,576 bytes"):
        read('{"prompt": "' + "a" * 2**20 + '"}')


def test_tasks_and_adapters(read) -> None:
    found = read(LINES)
    kept, others = found.for_adapters(["upper"], "ssr")
    assert [p.line for p in kept.prompts] == [1, 4]
    assert others == ["reverse"]
    with pytest.raises(
        UserInputError, match=r"none of its tasks is an adapter .* tasks: upper, reverse; adapters: x, y"
    ):
        found.for_adapters(["x", "y"], "ssr")
    with pytest.raises(UserInputError, match="has no prompts of sort, and ssr needs some for every adapter"):
        found.for_adapters(["upper", "sort"], "ssr")
