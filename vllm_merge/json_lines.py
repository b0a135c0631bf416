# SPDX-License-Identifier: Apache-2.0
"""Files of JSON objects, one a line, read with errors that name file and line."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from vllm_merge.errors import UserInputError

MAX_LINE_BYTES = 2**20


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines and their numbers, from 1. Raises UserInputError for a line of over MAX_LINE_BYTES, or an unreadable file."""
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


def read_object(raw: bytes, where: str, hint: str = "") -> dict[str, Any]:
    """The object in a line. hint: what ends the error, such as `; a line is …`. Raises UserInputError."""
    try:
        fields = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise UserInputError(f"{where}: not valid JSON ({error}){hint}") from None
    if not isinstance(fields, dict):
        raise UserInputError(f"{where}: expected a JSON object, found {type(fields).__name__}{hint}")
    return fields


def require_texts(fields: Mapping[str, object], names: Iterable[str], where: str, hint: str) -> None:
    """Raise UserInputError unless each of these fields is a text that is not empty."""
    for name in names:
        if name not in fields:
            raise UserInputError(f"{where}: {name!r} is missing{hint}")
        value = fields[name]
        if not isinstance(value, str) or not value.strip():
            raise UserInputError(f"{where}: {name!r} is {str(value)[:60]!r}; expected text that is not empty")
