# SPDX-License-Identifier: Apache-2.0
"""A few sample texts of a task, from the JSON lines it is trained on."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_merge.errors import UserInputError
from vllm_merge.json_lines import read_lines, read_object

FILE = "train.jsonl"
TEXT_FIELDS = ("text", "prompt")
_HOLE = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class TaskSamples:
    """The texts of a task, as the model will read them in training."""

    name: str
    texts: Sequence[str]


def read_samples(path: Path, count: int, template: str | None = None, seed: int = 0) -> TaskSamples:
    """`count` texts of a task at random: all where there are fewer. The task is called after its folder or file.

    path: a folder with train.jsonl, or a file of such lines: JSON objects with `text` or `prompt`. template: how a text
    is made of a line's fields, `{field}` standing for the value of each; default is the text alone.
    Raises UserInputError, with file and line, where there is none or a line is something else.
    """
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        missing = f"it has no {FILE}" if path.is_dir() else "there is no such file or folder"
        raise UserInputError(f"--tasks {path}: {missing}; give a folder with {FILE}, or a file of JSON lines")
    rng = random.Random(seed)
    chosen: list[str] = []
    for index, text in enumerate(_texts(file, template)):
        if len(chosen) < count:
            chosen.append(text)
        elif (place := rng.randrange(index + 1)) < count:  # every text is as likely as any other
            chosen[place] = text
    if not chosen:
        raise UserInputError(f"{file}: has no samples; a line is {{{TEXT_FIELDS[0]!r}: …}} as JSON")
    return TaskSamples(path.resolve().name if path.is_dir() else path.stem, chosen)


def _texts(file: Path, template: str | None) -> Iterator[str]:
    for number, raw in read_lines(file):
        if raw.strip():
            yield _text(raw, template, f"{file}:{number}")


def _text(raw: bytes, template: str | None, where: str) -> str:
    fields = read_object(raw, where)
    if template is None:
        text = next((fields[name] for name in TEXT_FIELDS if name in fields), None)
        if not isinstance(text, str) or not text.strip():
            raise UserInputError(
                f"{where}: expected text in {' or '.join(map(repr, TEXT_FIELDS))}, found the fields {', '.join(fields)}; "
                "say with --template how a text is made of them"
            )
        return text
    return _HOLE.sub(lambda hole: _filled(fields, hole[1], where), template)


def _filled(fields: dict[str, Any], name: str, where: str) -> str:
    if name not in fields:
        raise UserInputError(f"{where}: --template asks for {{{name}}}, and the line has {', '.join(fields)}")
    return str(fields[name])
