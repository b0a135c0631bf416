# SPDX-License-Identifier: Apache-2.0
"""What API processes share: everything survives the way through JSON, and aliases move as the file and people say."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.serving.facts import FACTS
from vllm_merge.adapters.catalogue import Catalogue
from vllm_merge.errors import UserInputError
from vllm_merge.recipe.plan import Plan
from vllm_merge.serving.control.names import Names, resolve_names
from vllm_merge.serving.control.state import State

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def names() -> Names:
    return resolve_names(ROOT / "configs" / "demo.yaml", FACTS, Catalogue(), {})


def reread_with(state: State, **aliases: str) -> State:
    """The state after the file was read again with these aliases."""
    recipes = replace(state.names.recipes, aliases=aliases)
    known = {name: known for name, known in state.names.names.items() if known.kind != "alias"}
    known |= {alias: replace(known[target], name=alias, kind="alias") for alias, target in aliases.items()}
    return state.reread(replace(state.names, recipes=recipes, names=known), (1, 2, 3))


@pytest.fixture
def state(names) -> State:
    return reread_with(State(0, names), x="ties", y="linear")


def test_a_state_survives_json_in_every_detail(state):
    moved = state.with_move("x", "linear").refused("a mistake", (4, 5, 6))
    back = State.from_message(json.loads(json.dumps(moved.to_message())))
    assert back == moved
    assert back.names.plans
    for digest, plan in back.names.plans.items():
        assert Plan.from_json(plan.to_json()).digest == digest, "the digest fits the content"


def test_a_move_changes_one_name_and_the_generation(state):
    moved = state.with_move("x", "knots-ties")
    changed = {name for name in moved.names.names if moved.names.names[name] != state.names.names[name]}
    assert changed == {"x"}
    assert moved.names.names["x"].label == state.names.names["knots-ties"].label
    assert (state.generation, moved.generation) == (1, 2)
    assert moved.with_move("x", "knots-ties") is moved
    back = moved.with_move("x", "ties")
    assert (back.generation, back.moved, back.names) == (3, {}, state.names)


@pytest.mark.parametrize(
    ("alias", "target", "message"),
    [("z", "ties", "no alias 'z'"), ("x", "tiess", "did you mean 'ties'"), ("x", "y", "no recipe or adapter 'y'")],
)
def test_what_cannot_be_moved_is_refused(state, alias, target, message):
    with pytest.raises(UserInputError, match=message):
        state.with_move(alias, target)


def test_a_move_stays_until_the_file_points_the_alias_elsewhere(state):
    moved = state.with_move("x", "linear").with_move("y", "ties")
    again = reread_with(moved, x="ties", y="knots-ties")
    assert (again.target("x"), again.target("y")) == ("linear", "knots-ties")
    assert again.names.names["x"].label == again.names.names["linear"].label
    assert set(again.moved) == {"x"}
    assert again.generation == moved.generation + 1
    gone = reread_with(again, y="linear")
    assert not gone.moved


def test_a_refused_file_changes_nothing_but_what_is_said_of_it(state):
    refused = state.refused("line 3 is wrong", (7, 8, 9))
    assert (refused.names, refused.generation) == (state.names, state.generation)
    assert (refused.error, refused.stamp) == ("line 3 is wrong", (7, 8, 9))
    assert reread_with(refused, x="ties").error is None
