# SPDX-License-Identifier: Apache-2.0
"""docs/recipe.md tells of every key that a recipe file may have, and every recipe file that is shipped is a right one."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel

from vllm_merge import load_recipes
from vllm_merge.methods.registry import default_registry
from vllm_merge.recipe.schema import AdapterEntry, Recipe, RecipeDocument

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
FILES = sorted((ROOT / "configs").rglob("*.yaml"))


@pytest.mark.parametrize(
    ("heading", "model"), [("Top level", RecipeDocument), ("`adapters`", AdapterEntry), ("`recipes`", Recipe)]
)
def test_every_key_has_its_row(heading: str, model: type[BaseModel]) -> None:
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    keys = {field.alias or name for name, field in model.model_fields.items()}
    assert {key for key in keys if f"\n| `{key}` |" not in section} == set()


def test_every_value_of_compat_is_named() -> None:
    registry = default_registry()
    specs = [spec for name in registry.names() for spec in registry.get(name).parameters if spec.name == "compat"]
    allowed = {value for spec in specs for value in ("peft", "lorax", "mergekit") if value in str(spec.json_schema)}
    assert allowed == {"peft", "lorax", "mergekit"}
    assert all(f"`{value}`" in PAGE or f"`compat: {value}`" in PAGE for value in allowed)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_shipped_recipe_files_are_valid(file: Path) -> None:
    assert load_recipes(file).recipes
