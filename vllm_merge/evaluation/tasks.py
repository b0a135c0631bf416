# SPDX-License-Identifier: Apache-2.0
"""Task files: one JSON object a line, {"task", "prompt", "answer"}."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vllm_merge.errors import UserInputError

FIELDS = ("task", "prompt", "answer")
EXAMPLE = '{"task": "sum", "prompt": "2 + 2 =", "answer": "4"}'
MAX_LINE_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt of a task and its right answer."""

    task: str
    prompt: str
    answer: str

    def is_right(self, text: str) -> bool:
        """Whether the first line of `text` that is not empty is the answer, spaces around both aside."""
        return text.strip().partition("\n")[0].strip() == self.answer.strip()


def read_tasks(path: Path, limit: int | None = None) -> list[Example]:
    """The examples of the file, of each task at most the first `limit`. Raises UserInputError with file and line."""
    taken: dict[str, int] = {}
    examples = []
    for number, raw in _lines(path):
        if not raw.strip():
            continue
        example = _example(raw, f"{path}:{number}")
        taken[example.task] = taken.get(example.task, 0) + 1
        if limit is None or taken[example.task] <= limit:
            examples.append(example)
    if not examples:
        raise UserInputError(f"{path}: has no examples; a line is {EXAMPLE}")
    return examples


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with path.open("rb") as file:
            number = 0
            while raw := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(raw) > MAX_LINE_BYTES:
                    raise UserInputError(f"{path}:{number}: the line is longer than {MAX_LINE_BYTES:,} bytes")
                yield number, raw
    except OSError as error:
        raise UserInputError(f"{path}: cannot be read: {error.strerror}") from None


def _example(raw: bytes, where: str) -> Example:
    try:
        fields = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise UserInputError(f"{where}: not valid JSON ({error}); a line is {EXAMPLE}") from None
    if not isinstance(fields, dict):
        raise UserInputError(f"{where}: expected a JSON object, found {type(fields).__name__}; a line is {EXAMPLE}")
    for name in FIELDS:
        if name not in fields:
            raise UserInputError(f"{where}: {name!r} is missing; a line is {EXAMPLE}")
        if not isinstance(fields[name], str) or not fields[name].strip():
            raise UserInputError(f"{where}: {name!r} is {str(fields[name])[:60]!r}; expected text that is not empty")
    return Example(*(fields[name] for name in FIELDS))
