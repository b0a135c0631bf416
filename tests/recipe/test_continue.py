# SPDX-License-Identifier: Apache-2.0
"""`continue`: what a recipe may go on from, what the plan makes of it, and what its digest stands for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from vllm_merge.errors import UserInputError
from vllm_merge.methods.registry import default_registry
from vllm_merge.recipe.continuation import check_states
from vllm_merge.recipe.file import RecipeFile
from vllm_merge.recipe.loading import parse_recipes
from vllm_merge.recipe.plan import Plan, make_plan
from vllm_merge.recipe.problems import RecipeError
from vllm_merge.recipe_files import check_precondition

HEAD = """\
version: 1
adapters: {a: {path: /a}, b: {path: /b}, saved: {path: /saved}}
aliases: {now: first}
recipes:
  first: {merge_method: opcm, adapters: [{adapter: a}]}
  sum: {merge_method: linear, adapters: [{adapter: a}]}
"""
HASHES = {"a": "hash a", "b": "hash b", "saved": "hash saved"}


def load(recipe: str) -> RecipeFile:
    text = f"{HEAD}  r: {{{recipe}}}\n"
    return parse_recipes(text, Path("/files/r.yaml"), default_registry(), check_precondition=check_precondition)


def plan(file: RecipeFile, name: str = "r", hashes: Mapping[str, str] = HASHES, **more: Any) -> Plan:
    defaults = {"base_model_hash": "", "max_rank": None, "dtype": "float32"}
    return make_plan(file, name, registry=default_registry(), adapter_hashes=hashes, **{**defaults, **more})


WRONG = {
    "merge_method: ties, continue: first": "7: recipes.r.continue: 'ties' cannot go on from an earlier result; methods "
    "that can: opcm",
    "merge_method: opcm, continue: sum": "7: recipes.r.continue: 'sum' is a recipe of 'linear', and 'opcm' goes on from "
    "results of its own alone; list it under `adapters` to merge it like any other",
    "merge_method: opcm, continue: now": "7: recipes.r.continue: 'now' is an alias, which may move; name what it points "
    "to, 'first'",
    "merge_method: opcm, continue: frist": "7: recipes.r.continue: no registered adapter or recipe 'frist', did you mean "
    "'first'? (known: a, b, saved, first, sum)",
    "merge_method: opcm, continue: first@12": "7: recipes.r.continue: is 'first@12'; give the name of a recipe or "
    "registered adapter, or NAME@DIGITS with at least 6 digits of its digest",
    "merge_method: opcm, continue: [first]": "7: recipes.r.continue: is ['first']; give the name of a recipe or "
    "registered adapter, or NAME@DIGITS with at least 6 digits of its digest",
    "merge_method: opcm, continue: first, parameters: {resume: true}": "7: recipes.r.parameters.resume: is set by "
    "`continue`; remove one of the two",
    "merge_method: opcm, continue: first, precondition: [norm_cap]": "7: recipes.r.precondition: would change what is "
    "continued as well; leave it out, or merge all adapters anew without `continue`",
    "merge_method: opcm, continue: r": "7: recipes.r: recipes use each other in a circle: r -> r",
}


@pytest.mark.parametrize("recipe", WRONG)
def test_what_is_wrong_is_said_with_its_line(recipe: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load(f"{recipe}, adapters: [{{adapter: b}}]")
    assert str(caught.value) == f"/files/r.yaml:{WRONG[recipe]}"


def test_the_plan_has_it_first_and_resumes() -> None:
    file = load("merge_method: opcm, continue: first, adapters: [{adapter: b}], parameters: {weight: 2, alpha: 0.3}")
    made = plan(file)
    assert [stage.name for stage in made.stages] == ["first", "r"]
    last = made.stages[-1].model_dump()
    assert last["inputs"] == (
        {"source": {"stage": "first"}, "parameters": {"weight": 1.0}},  # the weight is of what is added
        {"source": {"adapter": "b"}, "parameters": {"weight": 2}},
    )
    assert last["parameters"] == {"alpha": 0.3, "shuffle": False, "resume": True, "lambda": 1.0}
    assert sorted(made.adapters) == ["a", "b"]


def test_a_saved_folder_goes_in_by_its_content() -> None:
    file = load("merge_method: opcm, continue: saved, adapters: [{adapter: b}]")
    made = plan(file)
    assert made.stages[0].inputs[0].source.model_dump() == {"adapter": "saved"}
    assert plan(file, hashes={**HASHES, "saved": "another"}).digest != made.digest
    # Merged beside b it is something else.
    beside = load("merge_method: opcm, adapters: [{adapter: saved}, {adapter: b}]")
    assert plan(beside).digest != made.digest


@pytest.mark.parametrize("earlier", ["first", "saved"])
def test_digits_pin_the_artifact(earlier: str) -> None:
    digest = plan(load("merge_method: opcm, adapters: [{adapter: b}]"), earlier).digest
    pinned = load(f"merge_method: opcm, continue: {earlier}@{digest[:12]}, adapters: [{{adapter: b}}]")
    free = load(f"merge_method: opcm, continue: {earlier}, adapters: [{{adapter: b}}]")
    assert plan(pinned).digest == plan(free).digest
    changed = {**HASHES, "a": "other", "saved": "other"}
    now = plan(free, earlier, changed).digest
    with pytest.raises(UserInputError) as caught:
        plan(pinned, hashes=changed)
    assert str(caught.value) == (
        f"/files/r.yaml:7: recipes.r.continue: '{earlier}' is {earlier}@{now[:12]} now, not {earlier}@{digest[:12]}: its "
        "recipe, its adapters, or the server's rank or dtype changed; write the new digits, or register the folder that "
        "the earlier result was saved to"
    )


def test_a_chain_is_planned_in_order() -> None:
    text = HEAD + "".join(
        f"  s{i}: {{merge_method: opcm, continue: {f's{i - 1}' if i else 'first'}, adapters: [{{adapter: b}}]}}\n"
        for i in range(30)
    )
    made = plan(parse_recipes(text, Path("/files/r.yaml"), default_registry()), "s29")
    assert [stage.name for stage in made.stages] == ["first", *(f"s{i}" for i in range(30))]


@pytest.mark.parametrize(
    ("state", "carries"),
    [(None, "carries no state of a sequential merge"), ("magmax", "carries the state of 'magmax'")],
)
def test_an_adapter_without_the_state_is_refused(state: str | None, carries: str) -> None:
    file = load("merge_method: opcm, continue: saved, adapters: [{adapter: b}]")
    check_states(file, ["first", "r"], lambda name: "opcm")
    with pytest.raises(UserInputError) as caught:
        check_states(file, ["first", "r"], lambda name: state)
    assert str(caught.value) == (
        f"/files/r.yaml:7: recipes.r.continue: adapter 'saved' {carries}, so 'opcm' cannot go on from it; give a folder "
        "that vllm-merge wrote for that method, with its merge_report.json, or merge all adapters anew without "
        "`continue`"
    )
