# SPDX-License-Identifier: Apache-2.0
"""`safety` of a recipe: its form, and the guard that refuses a recipe under its floor."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_merge import UserInputError, load_recipes
from vllm_merge.recipe.file import RecipeFile
from vllm_merge.recipe.safety import refusal

FILE = """\
version: 1
adapters: {{a: {{path: ./a}}}}
recipes:
  plain: {{merge_method: linear, adapters: [{{adapter: a}}]}}
  r: {{merge_method: linear, adapters: [{{adapter: a}}], safety: {safety}}}
aliases: {{best: r}}
"""


def read(tmp_path: Path, safety: str) -> RecipeFile:
    path = tmp_path / "r.yaml"
    path.write_text(FILE.format(safety=safety), encoding="utf-8")
    return load_recipes(path)


@pytest.mark.parametrize("safety", ["{floor: 0.9, score: 0.93}", "{floor: 0.9, score: 0.9}", "{floor: 0, score: 0}"])
def test_at_or_above_the_floor(tmp_path: Path, safety: str) -> None:
    assert refusal(read(tmp_path, safety).recipes, "r") is None


def test_under_the_floor(tmp_path: Path) -> None:
    recipes = read(tmp_path, "{floor: 0.9, score: 0.8999, measured_by: us}").recipes
    said = refusal(recipes, "r")
    assert said is not None
    assert said.startswith(
        "recipe 'r' is refused: its safety score of 0.8999 is under its floor of 0.9, measured by us;"
    )
    assert refusal(recipes, "plain") is None
    assert refusal(recipes, "a") is None


def test_not_measured(tmp_path: Path) -> None:
    said = refusal(read(tmp_path, "{floor: 0.9}").recipes, "r")
    assert said is not None
    assert "states a safety floor of 0.9 and no measured score" in said


@pytest.mark.parametrize(
    ("safety", "said"),
    [
        ("{score: 0.9}", "recipes.r.safety.floor: is missing"),
        ("{floor: 1.1, score: 0.9}", "recipes.r.safety.floor: is 1.1; allowed is at most 1"),
        ("{floor: -0.1}", "recipes.r.safety.floor: is -0.1; allowed is at least 0"),
        ("{floor: 0.9, score: .nan}", "recipes.r.safety.score: is nan; expected a finite number"),
        ("{floor: 0.9, score: high}", "recipes.r.safety.score: is 'high'; expected a number"),
        ("{floor: 0.9, scored: 1}", "recipes.r.safety.scored: unknown key, did you mean 'score'?"),
        ("0.9", "recipes.r.safety: is 0.9; expected a mapping"),
    ],
)
def test_wrong(tmp_path: Path, safety: str, said: str) -> None:
    with pytest.raises(UserInputError) as caught:
        read(tmp_path, safety)
    assert f"r.yaml:5: {said}" in str(caught.value)
