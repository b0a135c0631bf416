# SPDX-License-Identifier: Apache-2.0
"""A recipe that lists more adapters than its method takes is refused when it is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_merge.methods.registry import default_registry
from vllm_merge.recipe.loading import parse_recipes
from vllm_merge.recipe.problems import RecipeError

TEXT = """\
version: 1
adapters: {a: {path: ./a}, b: {path: ./b}, c: {path: ./c}}
recipes:
  r:
    merge_method: METHOD
    adapters: ADAPTERS
"""


def parse(method: str, names: str) -> object:
    adapters = "[" + ", ".join(f"{{adapter: {name}}}" for name in names) + "]"
    text = TEXT.replace("METHOD", method).replace("ADAPTERS", adapters)
    return parse_recipes(text, Path("/files/r.yaml"), default_registry())


@pytest.mark.parametrize("method", ["slerp", "nuslerp", "nearswap"])
def test_three_where_two_are_taken(method: str) -> None:
    with pytest.raises(RecipeError, match=rf"r.yaml:6: recipes.r.adapters: are 3; '{method}' takes 2 at most"):
        parse(method, "abc")


def test_two_and_any_number() -> None:
    assert parse("slerp", "ab")
    assert parse("karcher", "abc")
