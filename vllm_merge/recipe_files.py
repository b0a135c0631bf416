# SPDX-License-Identifier: Apache-2.0
"""Recipe files against what is installed: the one place where the recipe package meets the merge methods."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from vllm_merge.methods.preconditions import resolve_preconditions
from vllm_merge.methods.registry import default_registry
from vllm_merge.recipe import loading
from vllm_merge.recipe.file import RecipeFile
from vllm_merge.recipe.problems import Problem


def load_recipes(path: str | Path, *, registered: Collection[str] = ()) -> RecipeFile:
    """Read and check the recipe file `path` against the built-in and installed methods and preconditions.

    registered: names of adapters that are known beside the file's. Raises UserInputError, with a line
    `file:line: key: message` for each mistake.
    """
    return loading.load_recipes(path, default_registry(), registered=registered, check_precondition=check_precondition)


def problems_of(text: str, file: Path, *, registered: Collection[str] = ()) -> tuple[Problem, ...]:
    """Every mistake in a recipe file of the content `text`; what it names is not looked for. `file`: for messages."""
    return loading.problems_of(
        text, file, default_registry(), registered=registered, check_precondition=check_precondition
    )


def check_precondition(precondition: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise UserInputError where {name: parameters} is not an installed precondition with right parameters."""
    resolve_preconditions([precondition])
