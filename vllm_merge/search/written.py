# SPDX-License-Identifier: Apache-2.0
"""The entry of a recipe file that a search leaves behind, with where it came from."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from vllm_merge.errors import UserInputError
from vllm_merge.methods.registry import default_registry
from vllm_merge.recipe.loading import parse_recipes

MARK = "# Found by `vllm-merge search`"
WIDTH = 118


def check_place(path: Path) -> None:
    """Raise UserInputError where a file that is no earlier result stands at the place of the new one."""
    if path.is_dir():
        raise UserInputError(f"--output {path}: is a folder; give a file, such as found.yaml")
    if not path.absolute().parent.is_dir():
        raise UserInputError(f"--output {path}: there is no folder {path.parent}")
    try:
        if path.exists() and not path.read_text(encoding="utf-8", errors="replace").startswith(MARK):
            raise UserInputError(f"--output {path}: is there already, and not from a search; give another file")
    except OSError as error:
        raise UserInputError(f"--output {path}: cannot be read: {error.strerror}") from None


def plain(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe without what is the default anyway."""
    usual = {"rank": "auto", "seed": 0, "parameters": {}}
    return {key: value for key, value in recipe.items() if key not in usual or value != usual[key]}


def text_of(name: str, recipe: Mapping[str, Any], adapters: Sequence[str], notes: Sequence[str]) -> str:
    """A recipe file with this one recipe. notes: sentences of its head; the first goes on after MARK."""
    head, *rest = notes
    lines = textwrap.wrap(f"{MARK[2:]} {head}", WIDTH - 2)
    lines += [line for note in rest for line in textwrap.wrap(note, WIDTH - 2)]
    document = {"version": 1, "recipes": {name: plain(recipe)}}
    body = yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=WIDTH, default_flow_style=None)
    text = "".join(f"# {line}\n" for line in lines) + body
    parse_recipes(text, Path("found.yaml"), default_registry(), registered=adapters)
    return text


def write(path: Path, text: str) -> None:
    """The file appears whole, by a rename."""
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)
