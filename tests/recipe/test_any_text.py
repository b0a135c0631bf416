# SPDX-License-Identifier: Apache-2.0
"""Whatever a recipe file holds, reading it gives a recipe file or RecipeError, in little time and memory."""

from pathlib import Path
from typing import Any

import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from vllm_merge.recipe.loading import load_recipes, parse_recipes
from vllm_merge.recipe.problems import RecipeError
from vllm_merge.recipe.protocols import Registry

FILE = Path("/files/r.yaml")
RIGHT = """\
version: 1
adapters: {a: {path: ./a}, b: {path: org/b, revision: v1}}
recipes:
  r: &r
    merge_method: ties
    adapters: [{adapter: a, parameters: {weight: [1, 0.5]}}, {adapter: b}]
    rank: {energy: 0.9}
aliases: {c: r}
"""
WORDS = st.sampled_from(
    [
        "version",
        "adapters",
        "recipes",
        "r",
        "a",
        "ties",
        "merge_method",
        "adapter",
        "parameters",
        "weight",
        "rank",
        "auto",
    ]
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), WORDS),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=4) | WORDS, inner, max_size=5)
    ),
    max_leaves=20,
)
quickly = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def reads_or_refuses(text: str, registry: Registry) -> None:
    message = f"{FILE}:"
    try:
        file = parse_recipes(text, FILE, registry)
        assert all(file.stage_order(name)[-1] == name for name in file.recipes)
    except RecipeError as error:
        message = str(error)
    assert message.encode().startswith(f"{FILE}:".encode())


@quickly
@given(st.text(max_size=200))
@example('a: "\\U99999999"')
@example('a: "\\ud800"')
@example("version: 1\nadapters: {a: {path: ~nobody-has-this-name/x}}")
@example("? &a [*a]\n: 1")
def test_any_text(registry: Registry, text: str) -> None:
    reads_or_refuses(text, registry)


@quickly
@given(st.integers(0, len(RIGHT)), st.integers(0, 30), st.text(max_size=12))
def test_any_change_to_a_right_file(registry: Registry, start: int, length: int, new: str) -> None:
    reads_or_refuses(RIGHT[:start] + new + RIGHT[start + length :], registry)


@quickly
@given(st.dictionaries(WORDS, VALUES, max_size=5), VALUES)
def test_any_values(registry: Registry, document: dict[str, Any], recipe: Any) -> None:
    for data in (document, {"version": 1, "recipes": {"r": recipe}}, {**document, "version": 1}):
        reads_or_refuses(yaml.safe_dump(data, allow_unicode=True), registry)


@quickly
@given(st.binary(max_size=200))
def test_any_bytes(registry: Registry, tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "r.yaml"
    file.write_bytes(content)
    message = f"{file}:"
    try:
        load_recipes(file, registry)
    except RecipeError as error:
        message = str(error)
    assert message.encode().startswith(f"{file}:".encode())
