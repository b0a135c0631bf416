# SPDX-License-Identifier: Apache-2.0
"""What the converters share: reading the source with its lines, collecting what is wrong, and naming adapters."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_merge.convert.written import Converted
from vllm_merge.recipe.file import is_local
from vllm_merge.recipe.problems import KeyPath, Problem, RecipeError, nearest, suggested
from vllm_merge.recipe.values import is_number, shown
from vllm_merge.recipe.yaml_tree import YamlTree

LARGE = 1e300  # numbers beyond it are no weights
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass
class Draft:
    """A conversion under way. given: paths by adapter name, from the command line. name: of the recipe."""

    tree: YamlTree
    file: Path
    name: str
    given: Mapping[str, str]
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    adapters: dict[str, dict[str, str]] = field(default_factory=dict)
    origin: dict[KeyPath, KeyPath] = field(default_factory=dict)
    """Keys of the recipe, without `recipes.NAME`, and the keys of the source that they are from."""

    def wrong(self, path: KeyPath, message: str) -> None:
        """Note that what stands at `path` is wrong or has no meaning here."""
        self.problems.append(Problem(path, self.tree.line(path), message))

    def note(self, text: str) -> None:
        """Note, once, what the reader should know."""
        if text not in self.notes:
            self.notes.append(text)

    def known_keys(self, path: KeyPath, found: Mapping[str, Any], known: Collection[str]) -> None:
        """Report keys that are not known."""
        for key in found:
            if key not in known:
                self.wrong((*path, key), f"is not a key of this format{suggested(key, known)}")

    def mapping(self, path: KeyPath, value: object) -> Mapping[str, Any]:
        """The value as a mapping; reports another kind, and gives an empty one."""
        if isinstance(value, dict):
            return value
        self.wrong(path, f"is {shown(value)}; expected a mapping")
        return {}

    def names_of(self, path: KeyPath, value: object) -> list[str]:
        """The value as a list of texts, at least one; reports anything else."""
        if isinstance(value, list) and value and all(isinstance(item, str) and item for item in value):
            return value
        self.wrong(path, f"is {shown(value)}; expected a list of at least one name")
        return []

    def weights(self, path: KeyPath, value: object, count: int, default: float | None) -> list[float]:
        """One finite number for each of `count` adapters; the default where there is none and it has one."""
        if value is None and default is not None:
            return [default] * count
        if not isinstance(value, list) or not all(is_number(item) and abs(item) < LARGE for item in value):
            self.wrong(path, f"is {shown(value)}; expected a list of {count} finite numbers, one per adapter")
        elif len(value) != count:
            self.wrong(path, f"has {len(value)} numbers for {count} adapters; give one per adapter")
        else:
            return [float(item) for item in value]
        return [1.0] * count

    def number(self, path: KeyPath, value: object, low: float, high: float) -> float:
        """A number above `low` and at most `high`; reports anything else."""
        if is_number(value) and low < value <= high:  # type: ignore[operator]
            return float(value)  # type: ignore[arg-type]
        self.wrong(path, f"is {shown(value)}; allowed is a number > {low:g}, ≤ {high:g}")
        return high

    def word(self, path: KeyPath, value: object, allowed: Sequence[str]) -> str:
        """One of the words; reports anything else."""
        if isinstance(value, str) and value in allowed:
            return value
        hint = nearest(value, allowed) if isinstance(value, str) else ""
        self.wrong(path, f"is {shown(value)}{hint}; allowed: {', '.join(allowed)}")
        return allowed[0]

    def register(self, path: str, revision: str | None = None) -> str:
        """The name of the adapter at this path, new or known: the last part of the path, made a name."""
        same = {"path": path, "revision": revision or "main"}
        for name, entry in self.adapters.items():
            if {"revision": "main", **entry} == same:
                return name
        stem = _NOT_IN_NAMES.sub("-", Path(path).name).strip("-._")[:56] or "adapter"
        taken = {self.name, *self.adapters}
        name = next(n for i in range(len(taken) + 1) if (n := stem if i == 0 else f"{stem}-{i + 1}") not in taken)
        self.register_as(name, path, revision)
        return name

    def register_as(self, name: str, path: str, revision: str | None = None) -> None:
        """An adapter of this name. A Hub repository without a revision gets `main`, with a note."""
        entry = {"path": path}
        if revision is None and not is_local(path):
            revision = "main"
            self.note(
                f"'{path}' is taken for a Hub repository, at its revision 'main'; write a commit, which never changes"
            )
        elif is_local(path) and not Path(path).expanduser().is_absolute():
            self.note("relative paths are taken from the folder of the recipe file")
        self.adapters[name] = entry if revision is None else {**entry, "revision": revision}

    def finish(self, recipe: Mapping[str, Any], base_model: str | None = None) -> Converted:
        """The recipe file. Raises RecipeError, with a line for each problem that was found."""
        if self.problems:
            raise RecipeError(self.file, self.problems)
        document: dict[str, Any] = {"version": 1}
        if base_model is not None:
            document["base_model"] = base_model
        document |= {"adapters": self.adapters, "recipes": {self.name: {k: v for k, v in recipe.items() if v != {}}}}
        return Converted(document, tuple(self.notes))


def items(names: Sequence[str], parameters: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The `adapters` of a recipe."""
    return [
        {"adapter": name, **({"parameters": dict(mine)} if mine else {})}
        for name, mine in zip(names, parameters, strict=True)
    ]
