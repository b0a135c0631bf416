# SPDX-License-Identifier: Apache-2.0
"""YAML as plain data with the line of every key.

Scalars follow the core schema of YAML 1.2: `1e-3` is a number, `yes`, `on` and `010` are what they look like. No tag
runs code, no key stands twice, and aliases cannot blow the document up.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from vllm_merge.recipe.problems import KeyPath, Problem, RecipeError

MAX_BYTES = 2**18
MAX_NODES = 100_000
MAX_DEPTH = 32

_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_WORDS: dict[str, Any] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".inf", ".Inf", ".INF", "+.inf", "+.Inf", "+.INF"), float("inf")),
    **dict.fromkeys(("-.inf", "-.Inf", "-.INF"), float("-inf")),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
}
_PLAIN_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "timestamp", "value")}
_COLLECTION_TAGS = {"tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"}


@dataclass(frozen=True)
class YamlTree:
    """`data`: dict, list, str, int, float, bool and None. `lines`: the 1-based line of every key and item."""

    data: Any
    lines: dict[KeyPath, int]

    def line(self, path: KeyPath) -> int:
        """The line of `path`, or of the nearest thing around it that is in the file."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)


def read_yaml(file: Path) -> YamlTree:
    """Read and parse `file`. Raises RecipeError."""
    try:
        with file.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise RecipeError(file, [Problem((), None, "there is no such file; check the path")]) from None
    except IsADirectoryError:
        raise RecipeError(file, [Problem((), None, "is a folder; give the recipe file itself")]) from None
    except OSError as error:
        message = f"cannot be read: {error.strerror}; correct its permissions, or the path"
        raise RecipeError(file, [Problem((), None, message)]) from None
    if len(raw) > MAX_BYTES:
        raise RecipeError(file, [Problem((), None, f"is larger than {MAX_BYTES:,} bytes; split it")])
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise RecipeError(file, [Problem((), line, f"byte {raw[error.start]:#04x} is not UTF-8")]) from None
    return parse_yaml(text, file)


def _in_words(context: str | None, problem: str | None) -> str:
    """What the parser says, in a user's words for the two mistakes that are made most."""
    if problem and "'\\t'" in problem:
        return "the line is indented with a tab; use spaces"
    if problem and problem.startswith("expected <block end>"):
        return "the line is indented differently from its neighbours; keys of one mapping begin in the same column"
    return " ".join(part for part in (context, problem) if part)


def parse_yaml(text: str, file: Path) -> YamlTree:
    """Parse `text`; `file` names it in messages. Raises RecipeError."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        said = _in_words(error.context, error.problem)
        raise RecipeError(file, [Problem((), mark.line + 1 if mark else 1, f"not valid YAML: {said}")]) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise RecipeError(file, [Problem((), line, f"not valid YAML: {error.reason}")]) from None
    except RecursionError:
        raise RecipeError(file, [Problem((), 1, f"is nested deeper than {MAX_DEPTH} levels")]) from None
    except (ValueError, OverflowError):  # PyYAML passes escapes to chr() unchecked
        raise RecipeError(file, [Problem((), 1, "not valid YAML: an escape such as \\U names no character")]) from None
    if node is None:
        raise RecipeError(file, [Problem((), 1, "is empty; a recipe file begins with `version: 1`")])
    builder = _Builder()
    data = builder.build(node, ())
    if builder.problems:
        raise RecipeError(file, builder.problems)
    return YamlTree(data, builder.lines)


class _Builder:
    def __init__(self) -> None:
        self.lines: dict[KeyPath, int] = {}
        self.problems: list[Problem] = []
        self._nodes = 0
        self._too_large = False

    def build(self, node: Node, path: KeyPath) -> Any:
        """The data of `node`. Aliases share nodes, so what is counted and bounded is what they expand to."""
        self.lines.setdefault(path, node.start_mark.line + 1)
        self._nodes += 1
        if self._nodes > MAX_NODES or len(path) > MAX_DEPTH:
            # Reported once: after it, every further node ends here at once.
            if not self._too_large:
                self._too_large = True
                bound = f"{MAX_NODES:,} values" if self._nodes > MAX_NODES else f"{MAX_DEPTH} levels"
                self._report((), node, f"has more than {bound}, aliases expanded")
            self._nodes = MAX_NODES
            return None
        if isinstance(node, ScalarNode):
            return self._scalar(node, path)
        if node.tag not in _COLLECTION_TAGS:
            return self._report(path, node, f"has the tag {node.tag}; tags are not allowed")
        if isinstance(node, SequenceNode):
            return [self.build(item, (*path, index)) for index, item in enumerate(node.value)]
        assert isinstance(node, MappingNode)
        return self._mapping(node, path)

    def _mapping(self, node: MappingNode, path: KeyPath) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for key, value in node.value:
            if not isinstance(key, ScalarNode):
                self._report(path, key, "has a key that is not text")
            elif key.tag == "tag:yaml.org,2002:merge":
                self._report(path, key, "uses a merge key (<<), which is not supported; repeat the keys")
            elif key.value in data:
                first = self.lines[(*path, key.value)]
                self._report((*path, key.value), key, f"is given twice, first on line {first}; remove one")
            else:
                self.lines[(*path, key.value)] = key.start_mark.line + 1
                data[key.value] = self.build(value, (*path, key.value))
        return data

    def _scalar(self, node: ScalarNode, path: KeyPath) -> Any:
        if node.tag not in _PLAIN_TAGS:
            return self._report(path, node, f"has the tag {node.tag}; tags are not allowed")
        text: str = node.value
        if node.style is not None:  # quoted or a block: text, whatever it looks like
            return text
        if text in _WORDS:
            return _WORDS[text]
        if _INT.fullmatch(text) and len(text) <= 40:
            return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
        if _FLOAT.fullmatch(text):
            return float(text)
        return text

    def _report(self, path: KeyPath, node: Node, message: str) -> None:
        self.problems.append(Problem(path, node.start_mark.line + 1, message))
