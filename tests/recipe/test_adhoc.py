# SPDX-License-Identifier: Apache-2.0
"""Recipes of requests: their short form as a name, and everything that they may not say."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_merge.methods.registry import default_registry
from vllm_merge.recipe.adhoc import (
    ALLOWED,
    MAX_NAME,
    MAX_TEXT,
    MAX_VALUES,
    AdHocError,
    Limits,
    Written,
    check_written,
    parse_name,
)
from vllm_merge.recipe_files import check_precondition, load_recipes

FILE = load_recipes(Path(__file__).resolve().parents[2] / "configs" / "demo.yaml")
LIMITS = Limits(rank=32, adapters=4)


def checked(written, limits=LIMITS):
    return check_written(written, FILE, default_registry(), check_precondition, limits)


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        (
            "merge:ties(upper=0.6,sort=0.4)",
            {
                "merge_method": "ties",
                "adapters": [
                    {"adapter": "upper", "parameters": {"weight": 0.6}},
                    {"adapter": "sort", "parameters": {"weight": 0.4}},
                ],
                "parameters": {},
            },
        ),
        (
            "merge:ties(upper,sort=-1e-1;density=0.2,lambda=2,rank=16,space=knots,seed=7,normalize=true,on_miss=reject)",
            {
                "merge_method": "ties",
                "adapters": [{"adapter": "upper"}, {"adapter": "sort", "parameters": {"weight": -0.1}}],
                "parameters": {"density": 0.2, "lambda": 2, "normalize": True},
                "rank": 16,
                "space": "knots",
                "seed": 7,
                "on_miss": "reject",
            },
        ),
        (
            "merge:linear(a.b-c_d;energy=0.9)",
            {
                "merge_method": "linear",
                "adapters": [{"adapter": "a.b-c_d"}],
                "parameters": {},
                "rank": {"energy": 0.9},
            },
        ),
    ],
)
def test_a_name_is_a_recipe(name, recipe):
    assert parse_name(name).recipe == recipe


@pytest.mark.parametrize(
    ("name", "column", "says"),
    [
        ("merge:", 7, "expected the name of a merge method; the name ends"),
        ("merge:ties", 11, "expected '('; the name ends"),
        ("merge:ties()", 12, "expected an adapter's name"),
        ("merge:ties(upper", 17, "expected '=' or ',' or ';' or ')'; the name ends"),
        ("merge:ties(upper=,sort)", 18, "expected a number; found ',sort)'"),
        ("merge:ties(upper=nan)", 18, "expected a number"),
        ("merge:ties(upper=1e999)", 18, "1e999 is too large"),
        ("merge:ties(upper, sort)", 18, "expected an adapter's name"),
        ("merge:ties(../etc/passwd=1)", 12, "expected an adapter's name"),
        ("merge:ties(upper/x=1)", 17, "found '/x=1)'"),
        ("merge:ties(upper;density)", 25, "expected '='"),
        ("merge:ties(upper;density=)", 26, "expected a number, true, false or a word"),
        ("merge:ties(upper;density=0.2,density=0.3)", 30, "density is given already, in column 18"),
        ("merge:ties(upper;rank=4,energy=0.3)", 25, "energy is given already, in column 18"),
        ("merge:ties(upper)x", 18, "nothing may follow the closing parenthesis; found 'x'"),
        ("merge:ties(upper;a=1;b=2)", 21, "expected ',' or ')'"),
    ],
)
def test_a_name_that_is_none_says_where(name, column, says):
    with pytest.raises(AdHocError) as wrong:
        parse_name(name)
    assert str(wrong.value).startswith(f"column {column}: ")
    assert says in str(wrong.value)
    assert wrong.value.param == "model"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("merge:teis(upper)", "column 7: merge_method: unknown merge method 'teis'"),
        ("merge:ties(upper,lower=1)", "column 18: adapters[1].adapter: no registered adapter or recipe 'lower'"),
        ("merge:ties(upper,assistant)", "'assistant' is an alias"),
        ("merge:ties(upper;density=2)", "column 18: parameters.density"),
        ("merge:ties(upper;weigth=2)", "column 18: parameters.weigth"),
        ("merge:ties(upper;space=nowhere)", "column 18: space: 'ties' is not defined in space 'nowhere'"),
        ("merge:ties(upper;rank=64)", "column 18: rank: is 64; at most 32 here"),
        ("merge:ties(upper;rank=lossless)", "column 18: rank: lossless has no bound"),
        ("merge:ties(upper;energy=2)", "column 18: rank: keeps energy 2"),
        ("merge:ties(upper;seed=-1)", "column 18: seed: is -1"),
        ("merge:ties(upper;on_miss=later)", "column 18: on_miss"),
        ("merge:ties(upper,sort,add,next,double)", "adapters: are 5; a merge of a request takes 4 at most"),
    ],
)
def test_what_a_name_asks_for_is_checked_like_a_file(name, says):
    with pytest.raises(AdHocError) as wrong:
        checked(parse_name(name))
    assert says in str(wrong.value)
    assert wrong.value.param == "model"


BASIC = {"merge_method": "ties", "adapters": [{"adapter": "upper"}, {"adapter": "sort"}]}


@pytest.mark.parametrize(
    ("change", "param", "says"),
    [
        ({"merge_method": 3}, "merge.merge_method", "is 3; expected text"),
        ({"adapters": []}, "merge.adapters", "expected at least 1 item"),
        ({"adapters": "upper"}, "merge.adapters", "expected a list"),
        ({"adapters": [{"adapter": "upper", "path": "/etc"}]}, "merge.adapters[0].path", "unknown key"),
        ({"adapters": [{"path": "/etc"}]}, "merge.adapters[0].adapter", "is missing"),
        ({"adapters": [{"adapter": "/etc"}]}, "merge.adapters[0].adapter", "no registered adapter"),
        ({"path": "/etc"}, "merge.path", "unknown key (allowed: merge_method"),
        ({"revision": "main"}, "merge.revision", "unknown key"),
        ({"aliases": {}}, "merge.aliases", "unknown key"),
        ({"experiments": {}}, "merge.experiments", "unknown key"),
        ({"load": "eager"}, "merge.load", "has no place in a merge of a request"),
        ({"continue": "upper"}, "merge.continue", "has no place in a merge of a request"),
        ({"on_error": "stop"}, "merge.on_error", "has no place in a merge of a request"),
        ({"rank": 33}, "merge.rank", "is 33; at most 32 here"),
        ({"rank": "lossless"}, "merge.rank", "lossless has no bound"),
        ({"rank": True}, "merge.rank", "allowed are auto"),
        ({"parameters": {"density": float("nan")}}, "merge.parameters.density", "numbers must be finite"),
        ({"parameters": {"density": [0.1] * (MAX_VALUES + 1)}}, "merge", "has more than 2,000 values"),
        ({"parameters": {"density": [[[[[[[[[1]]]]]]]]]}}, "merge", "is nested deeper than 8 levels"),
        ({"parameters": {"density": [{"filter": "x" * MAX_TEXT, "value": 1.0}]}}, "merge", "65,536 characters of text"),
        ({"x" * (MAX_TEXT + 1): 1}, "merge", "has more than 65,536 characters of text"),
        ({"parameters": {"density": [{"filter": "\ud800", "value": 1.0}]}}, "merge", "half of a surrogate pair"),
        ({"\udfff": 1}, "merge", "half of a surrogate pair"),
        ({"precondition": ["nothing"]}, "merge.precondition[0]", "unknown precondition 'nothing'"),
        ({"on_miss": "fallback"}, "merge.fallback", "is missing"),
        ({"on_miss": "fallback", "fallback": "nobody"}, "merge.fallback", "no recipe or adapter 'nobody'"),
        ({"adapters": [{"adapter": "upper"}] * 10_000}, "merge.adapters", "a merge of a request takes 4 at most"),
    ],
)
def test_every_mistake_names_its_field(change, param, says):
    with pytest.raises(AdHocError) as wrong:
        checked(Written({**BASIC, **change}))
    assert wrong.value.param == param
    assert str(wrong.value).startswith(f"{param}: ")
    assert says in str(wrong.value)


@pytest.mark.parametrize("recipe", [None, [], "ties(upper)", 3, True])
def test_what_is_no_recipe_is_refused(recipe):
    with pytest.raises(AdHocError, match="expected a recipe"):
        checked(Written(recipe))


def test_recipes_of_the_file_may_go_in_and_stand_in():
    recipe = checked(
        Written({**BASIC, "adapters": [{"adapter": "weighted"}], "on_miss": "fallback", "fallback": "base"})
    )
    assert recipe.sources == ["weighted"]
    assert (recipe.on_miss, recipe.fallback) == ("fallback", "base")


def test_a_file_with_a_recipe_of_any_name_is_no_obstacle():
    other = replace(FILE, recipes={**FILE.recipes, "adhoc": FILE.recipes["weighted"]})
    recipe = check_written(parse_name("merge:linear(adhoc)"), other, default_registry(), check_precondition, LIMITS)
    assert recipe.sources == ["adhoc"]


def test_a_name_has_a_bound():
    with pytest.raises(AdHocError, match="at most 2,000"):
        parse_name("merge:ties(" + "a" * MAX_NAME + ")")


def test_the_allowed_keys_are_the_recipes_own_but_those_of_a_start():
    assert set(ALLOWED) == {
        "merge_method", "space", "adapters", "precondition", "parameters", "rank", "seed", "on_miss", "fallback",
    }  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="abut:(),;=.0123456789e+-_ é\n\x00/", max_size=60))
def test_any_text_is_a_recipe_or_an_error(text):
    wrong = None
    try:
        written = parse_name("merge:" + text)
    except AdHocError as error:
        wrong = str(error)
    if wrong is None:
        assert written.recipe["adapters"]
        json.dumps(written.recipe, allow_nan=False)
    else:
        assert 1 <= int(wrong.split(":")[0].removeprefix("column ")) <= len(text) + 7


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from([*ALLOWED, "load", "x"]), values, max_size=5))
def test_any_json_is_a_recipe_or_an_error(document):
    wrong = None
    try:
        checked(Written({**BASIC, **document}))
    except AdHocError as error:
        wrong = error
    if wrong is not None:
        assert wrong.param.startswith("merge")
        assert len(str(wrong)) < 1000
