# SPDX-License-Identifier: Apache-2.0
"""Task files: one JSON object a line, {"task", "prompt", "answer"}."""

from dataclasses import dataclass
from pathlib import Path

from vllm_merge.errors import UserInputError
from vllm_merge.json_lines import read_lines, read_object, require_texts

FIELDS = ("task", "prompt", "answer")
EXAMPLE = '{"task": "sum", "prompt": "2 + 2 =", "answer": "4"}'


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
    for number, raw in read_lines(path):
        if not raw.strip():
            continue
        example = _example(raw, f"{path}:{number}")
        taken[example.task] = taken.get(example.task, 0) + 1
        if limit is None or taken[example.task] <= limit:
            examples.append(example)
    if not examples:
        raise UserInputError(f"{path}: has no examples; a line is {EXAMPLE}")
    return examples


def _example(raw: bytes, where: str) -> Example:
    hint = f"; a line is {EXAMPLE}"
    fields = read_object(raw, where, hint)
    require_texts(fields, FIELDS, where, hint)
    return Example(*(fields[name] for name in FIELDS))
