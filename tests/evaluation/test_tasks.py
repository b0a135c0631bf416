# SPDX-License-Identifier: Apache-2.0
"""Task files and scores."""

from pathlib import Path

import pytest

from vllm_merge.errors import UserInputError
from vllm_merge.evaluation.scores import score, wilson
from vllm_merge.evaluation.tasks import EXAMPLE, Example, read_tasks
from vllm_merge.json_lines import MAX_LINE_BYTES

GOOD = '{"task": "a", "prompt": "p", "answer": "x"}\n'


def test_reading(tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    file.write_text(GOOD + "\n" + GOOD.replace('"a"', '"b"') + GOOD.replace('"p"', '"q"'))
    assert read_tasks(file) == [Example("a", "p", "x"), Example("b", "p", "x"), Example("a", "q", "x")]
    assert read_tasks(file, 1) == [Example("a", "p", "x"), Example("b", "p", "x")]


WRONG = {
    "nothing": ("\n", f": has no examples; a line is {EXAMPLE}"),
    "not JSON": (
        GOOD + "{",
        ":2: not valid JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1)); "
        f"a line is {EXAMPLE}",
    ),
    "a list": ("[]", f":1: expected a JSON object, found list; a line is {EXAMPLE}"),
    "no answer": (GOOD + '{"task": "a", "prompt": "p"}', f":2: 'answer' is missing; a line is {EXAMPLE}"),
    "a number": ('{"task": 1, "prompt": "p", "answer": "x"}', ":1: 'task' is '1'; expected text that is not empty"),
    "empty": ('{"task": "a", "prompt": " ", "answer": "x"}', ":1: 'prompt' is ' '; expected text that is not empty"),
    "too long": ("x" * (MAX_LINE_BYTES + 1), ":1: the line is longer than 1,048,576 bytes"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_files(case: str, tmp_path: Path) -> None:
    text, message = WRONG[case]
    file = tmp_path / "t.jsonl"
    file.write_text(text)
    with pytest.raises(UserInputError) as caught:
        read_tasks(file)
    assert str(caught.value) == f"{file}{message}"


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match=r"none.jsonl: cannot be read: No such file or directory$"):
        read_tasks(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    ("text", "right"),
    [("x", True), ("  x \nmore", True), ("\n\nx", True), ("xy", False), ("", False), ("y\nx", False), ("X", False)],
)
def test_exact_match_of_the_first_line(text: str, right: bool) -> None:
    assert Example("a", "p", " x").is_right(text) is right


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3 (Wilson without continuity correction).
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_against_the_published_examples(right: int, total: int, low: float, high: float) -> None:
    assert wilson(right, total) == pytest.approx((low, high), abs=5e-5)
    assert wilson(total - right, total) == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_score() -> None:
    examples = [Example("a", "p", "x")] * 3 + [Example("b", "p", "y")] * 2
    found = score("r", "recipe", examples, ["x", "x", "no", "y", "y"])
    assert (found.tasks["a"].right, found.tasks["a"].total, found.tasks["a"].accuracy) == (2, 3, pytest.approx(2 / 3))
    assert found.mean.accuracy == pytest.approx(5 / 6)  # tasks count alike, examples do not
    assert (found.mean.right, found.mean.total) == (4, 5)
    assert (found.tasks["a"].low, found.tasks["a"].high) == wilson(2, 3)
    assert 0 < found.mean.low < found.mean.accuracy < found.mean.high <= 1
    # Tighter than the widest of its parts: two independent tasks say more than one.
    assert found.mean.high - found.mean.low < found.tasks["a"].high - found.tasks["a"].low


def test_mean_of_one_task_has_its_interval() -> None:
    found = score("r", "recipe", [Example("a", "p", "x")] * 4, ["x", "x", "x", ""])
    assert (found.mean.low, found.mean.high) == pytest.approx(wilson(3, 4))
