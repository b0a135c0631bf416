# SPDX-License-Identifier: Apache-2.0
"""A recipe file that has been read and checked."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from vllm_merge.errors import UserInputError
from vllm_merge.recipe.experiments import Experiment
from vllm_merge.recipe.problems import dotted, place, suggested
from vllm_merge.recipe.schema import AdapterEntry, Recipe

_HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class RecipeFile:
    """The content of `path`. Adapters and base model are absolute folders or Hub names; all names are distinct."""

    path: Path
    base_model: str | None
    adapters: Mapping[str, AdapterEntry]
    recipes: Mapping[str, Recipe]
    aliases: Mapping[str, str]
    experiments: Mapping[str, Experiment] = field(default_factory=dict)
    lines: Mapping[str, int] = field(default_factory=dict)
    """Of keys such as `adapters.NAME.path` that name something outside of the file, for what is found there."""

    def place(self, *path: str) -> str:
        """`file:line: key`, for messages."""
        return place(self.path, path, self.lines.get(dotted(path)))

    def with_adapters(self, adapters: Mapping[str, AdapterEntry]) -> "RecipeFile":
        """The file with further registered adapters. Raises UserInputError where a name is taken."""
        for name in adapters:
            if any(name in names for names in (self.adapters, self.recipes, self.aliases, self.experiments)):
                raise UserInputError(f"{self.path}: the name {name!r} is that of a registered adapter too; rename one")
        return replace(self, adapters={**self.adapters, **adapters})

    def with_recipe(self, name: str, recipe: Recipe) -> "RecipeFile":
        """The file with another recipe. Raises UserInputError where the name is taken."""
        if any(name in names for names in (self.adapters, self.recipes, self.aliases, self.experiments)):
            raise UserInputError(f"{self.path}: the name {name!r} is that of an added recipe too; rename one")
        return replace(self, recipes={**self.recipes, name: recipe})

    def with_paths(self, paths: Mapping[str, Path]) -> "RecipeFile":
        """The file with the adapters of `paths` at these folders: for Hub repositories that are on this machine."""
        found = {n: e.model_copy(update={"path": str(paths[n])}) if n in paths else e for n, e in self.adapters.items()}
        return replace(self, adapters=found)

    def target(self, name: str) -> str:
        """The recipe or adapter that `name` stands for: itself, or where the alias points. Raises UserInputError."""
        name = self.aliases.get(name, name)
        if name not in self.recipes and name not in self.adapters:
            names = [*self.recipes, *self.aliases, *self.adapters]
            raise UserInputError(f"{self.path}: no recipe or adapter {name!r}{suggested(name, names)}")
        return name

    def stage_order(self, recipe: str) -> list[str]:
        """The recipes that `recipe` uses, directly or not, each after those it uses; `recipe` itself is the last."""
        order: dict[str, None] = {}
        stack = [(recipe, iter(self.recipes[recipe].sources))]  # not recursion: a chain may be of any length
        while stack:
            name, items = stack[-1]
            for source in items:
                if source in self.recipes and source not in order:
                    stack.append((source, iter(self.recipes[source].sources)))
                    break
            else:
                order[name] = None
                stack.pop()
        return list(order)


def begins_as_path(name: str) -> bool:
    """Whether `name` is meant as a path, wherever it leads."""
    return name.startswith((".", "/", "~"))


def is_local(path: str) -> bool:
    """Whether `path` can only be a folder, not the name of a Hub repository."""
    return begins_as_path(path) or _HUB_NAME.fullmatch(path) is None


def base_model_path(path: str, directory: Path) -> str:
    """`path` as an absolute folder where it is one, taken from `directory`; else as it is, the name of a model."""
    local = absolute_path(path, directory)
    return local if begins_as_path(path) or Path(local).is_dir() else path


def absolute_path(path: str, directory: Path) -> str:
    """`path` as an absolute folder, taken from `directory`; a Hub name stays, unless such a folder is there."""
    try:
        expanded = Path(path).expanduser()
    except RuntimeError:  # ~someone who has no home here; the path is then reported as no folder
        expanded = Path(path)
    local = Path(os.path.normpath(directory.absolute() / expanded))
    return str(local) if is_local(path) or local.is_dir() else path
