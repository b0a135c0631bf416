# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a recipe file: where, in words, several at a time."""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from vllm_merge.errors import UserInputError

KeyPath = tuple[str | int, ...]
Finding = tuple[KeyPath, str]
MAX_SHOWN = 20
MAX_KEY, MAX_MESSAGE = 200, 1000  # characters
MAX_LISTED = 16  # names: all keys of a recipe
MAX_HINTED_NAMES = 1000  # beyond this many names, looking for a near one takes too long


@dataclass(frozen=True)
class Problem:
    """One mistake: the key it is at (empty: the whole file), its line (1-based; None: of no line), and the message."""

    path: KeyPath
    line: int | None
    message: str


class RecipeError(UserInputError):
    """A recipe file is wrong. The text has a line `file:line: key: message` for each of `problems`."""

    def __init__(self, file: Path, problems: Sequence[Problem]) -> None:
        self.file = file
        self.problems = tuple(sorted(problems, key=lambda problem: problem.line or 0))
        lines = [_text(file, problem) for problem in self.problems[:MAX_SHOWN]]
        if len(self.problems) > MAX_SHOWN:
            lines.append(f"{file}: and {len(self.problems) - MAX_SHOWN} more")
        super().__init__("\n".join(lines))


def _text(file: Path, problem: Problem) -> str:
    return f"{place(file, problem.path, problem.line)}: {cut(problem.message, MAX_MESSAGE)}"


def place(file: Path, path: KeyPath, line: int | None) -> str:
    """`file:line: key`, without what is not known."""
    key, where = cut(dotted(path), MAX_KEY), f"{file}:{line}" if line else str(file)
    return f"{where}: {key}" if key else where


def cut(text: str, length: int) -> str:
    """`text`, shortened in its middle where it is longer than `length`."""
    return text if len(text) <= length else f"{text[: length // 2]}…{text[-(length // 2) :]}"


def dotted(path: KeyPath) -> str:
    """`("recipes", "a", "adapters", 0)` as `recipes.a.adapters[0]`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def nearest(name: str, names: Iterable[str]) -> str:
    """`, did you mean 'x'?` for the nearest of `names`, or nothing."""
    near = difflib.get_close_matches(name[:80], list(islice(names, MAX_HINTED_NAMES)), n=1)
    return f", did you mean {near[0]!r}?" if near else ""


def suggested(name: str, names: Iterable[str], kind: str = "known") -> str:
    """`, did you mean 'x'? (known: x, y)` for a name that is none of `names`."""
    items = list(names)
    return f"{nearest(name, items)} ({kind}: {listed(items)})"


def counted(number: int, word: str) -> str:
    """`1 recipe`, `2 recipes`, `2 aliases`."""
    plural = f"{word}es" if word.endswith("s") else f"{word}s"
    return f"{number} {word if number == 1 else plural}"


def listed(names: Iterable[str]) -> str:
    """`a, b, c` for a message, cut where it is long; `none` for none."""
    items = list(names)
    more = len(items) - MAX_LISTED
    return (", ".join(items[:MAX_LISTED]) + (f" and {more} more" if more > 0 else "")) or "none"
