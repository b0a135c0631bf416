# SPDX-License-Identifier: Apache-2.0
"""Candidates: ranges of parameters, how often a method is tried, the evidence that --auto begins with, and their names."""

import json
import math

import pytest

from tests.conftest import ROOT
from vllm_merge.errors import UserInputError
from vllm_merge.methods.registry import default_registry
from vllm_merge.recipe.adhoc import parse_name
from vllm_merge.recipe.loading import parse_recipes
from vllm_merge.search.candidates import Space, scaled, turns
from vllm_merge.search.evidence import FILE, HALF, evidence, shares, table
from vllm_merge.search.ranges import Choice, Range, of_schema, parse

REGISTRY = default_registry()
ADAPTERS = ("sql", "code", "chat")


def spec(method, name):
    return REGISTRY.get(method).parameter(name)


@pytest.mark.parametrize(
    ("method", "name", "wanted"),
    [
        ("ties", "density", Range(0.2 / 3, 0.6000000000000001, log=True)),
        ("breadcrumbs", "density", Range(0.3, 1, log=True)),
        ("svc", "alpha", Range(0.1 / 3, 0.30000000000000004, log=True)),
        ("ties", "normalize", Choice((True, False))),
        ("dare_ties", "rescale", Choice((True, False, "l1"))),
        ("do_merging", "norm_power", Choice((2, 1))),
        ("doge", "steps", None),
        ("wudi", "steps", None),
        ("sce", "compat", None),
        ("ties", "lambda", None),
    ],
)
def test_what_a_parameter_is_searched_in_comes_from_its_schema(method, name, wanted):
    assert of_schema(spec(method, name)) == wanted


def test_every_default_range_is_allowed():
    for name in REGISTRY.names():
        for parameter in REGISTRY.get(name).parameters:
            dimension = of_schema(parameter)
            if dimension is not None:
                for share in (0.0, 0.3, 0.999999, 1.0):
                    parameter.validate(name, dimension.at(share))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("density=0.1..0.5", ("density", Range(0.1, 0.5, log=True))),
        ("weight=-1..1", ("weight", Range(-1, 1))),
        ("steps=10..100", ("steps", Range(10, 100, whole=True))),
        ("trim=global,module", ("trim", Choice(("global", "module")))),
        ("normalize=true", ("normalize", Choice((True,)))),
        ("lambda=1..2", ("lambda", Range(1, 2, log=True))),
    ],
)
def test_parameters_of_the_command_line(text, wanted):
    assert parse(text) == wanted


@pytest.mark.parametrize(
    "text", ["density", "=1", "density=", "density=1..0.5", "density=a..b", "x=/etc", "x=inf", "x=1,,2"]
)
def test_wrong_parameters_are_refused(text):
    with pytest.raises(UserInputError, match="--parameter"):
        parse(text)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (Space(ADAPTERS, ["tiess"]), "did you mean 'ties'"),
        (Space(ADAPTERS, ["ties"], parameters={"densty": Choice((0.1,))}), "no method of this search has it"),
        (
            Space(ADAPTERS, ["ties"], parameters={"density": Range(0.1, 1.5)}),
            "--parameter density: parameter 'density' is 1.5",
        ),
        (Space(ADAPTERS, ["slerp"]), "takes 3 adapters"),
        (Space(ADAPTERS, ["tsv_m"], spaces=["delta"]), "in these spaces"),
    ],
)
def test_a_space_without_candidates_says_why(space, message):
    with pytest.raises(UserInputError, match=message):
        space.arms(REGISTRY)


def names(space, count):
    return [scaled(c, 0.5).name for _, c in space.draw(space.arms(REGISTRY), count)]


def test_candidates_are_recipes_that_a_server_takes_and_the_seed_decides():
    space = Space(ADAPTERS, auto=True, ranks=("auto", 8), seed=3)
    drawn = names(space, 60)
    assert drawn == names(space, 60)
    assert drawn != names(Space(ADAPTERS, auto=True, ranks=("auto", 8), seed=4), 60)
    assert len(set(drawn)) == 60
    for (_, candidate), name in zip(space.draw(space.arms(REGISTRY), 60), drawn, strict=True):
        recipe = scaled(candidate, 0.5).recipe
        text = json.dumps({"version": 1, "recipes": {"x": dict(recipe)}})
        assert parse_recipes(text, ROOT / "x.yaml", REGISTRY, registered=ADAPTERS).recipes["x"].merge_method
        sent = parse_name(name).recipe
        assert sent["parameters"] == recipe["parameters"], "the name says all of the recipe"
        weights = [item.get("parameters") for item in recipe["adapters"]]
        assert [item.get("parameters") for item in sent["adapters"]] == weights
        assert sent.get("rank", "auto") == recipe["rank"]


def test_the_first_of_a_method_has_its_defaults_and_every_second_one_its_own_weights():
    space = Space(ADAPTERS, ["ties"])
    drawn = [candidate for _, candidate in space.draw(space.arms(REGISTRY), 6)]
    assert drawn[0].recipe["parameters"] == {}
    weighed = ["parameters" in c.recipe["adapters"][0] for c in drawn]
    assert weighed == [False, True, False, True, False, True]
    assert all("density" in c.recipe["parameters"] for c in drawn[1:])


def test_what_is_given_is_kept():
    parameters = {"density": Choice((0.3,)), "weight": Choice((0.7,)), "lambda": Range(1, 2)}
    space = Space(ADAPTERS, ["ties"], ["core", "knots"], parameters)
    arms = space.arms(REGISTRY)
    assert {arm.space for arm in arms} == {"core", "knots"}
    for _, candidate in space.draw(arms, 8):
        assert candidate.size is None, "λ was given"
        assert candidate.recipe["parameters"]["density"] == 0.3
        assert 1 <= candidate.recipe["parameters"]["lambda"] <= 2
        assert [item["parameters"] for item in candidate.recipe["adapters"]] == [{"weight": 0.7}] * 3


def test_lambda_gives_a_result_its_size():
    space = Space(ADAPTERS, ["linear"], parameters={"size": Choice((1.2,))})
    ((_, candidate),) = space.draw(space.arms(REGISTRY), 1)
    assert scaled(candidate, 0.4).recipe["parameters"]["lambda"] == pytest.approx(3.0)
    assert scaled(candidate, math.inf).recipe["parameters"]["lambda"] == pytest.approx(1.2)


def test_turns_are_in_proportion_from_the_beginning_on():
    order = turns([1.0, 0.5, 0.25], 28)
    assert [order.count(i) for i in range(3)] == [16, 8, 4]
    assert [order[:7].count(i) for i in range(3)] == [4, 2, 1]


def test_auto_tries_what_kept_more_more_often():
    rows = evidence()
    often = shares(rows)
    assert often[rows[0].method, rows[0].space] == 1
    worse = next(row for row in rows if row.kept < rows[0].kept)
    assert often[worse.method, worse.space] == pytest.approx(0.5 ** ((rows[0].kept - worse.kept) / HALF))
    space = Space(ADAPTERS, auto=True)
    methods = [candidate.method for _, candidate in space.draw(space.arms(REGISTRY), 30)]
    assert methods.count(rows[0].method) >= 3
    assert "model_stock" not in methods, "it kept 30 %"
    assert methods[0] == rows[0].method


def test_the_evidence_is_what_was_recorded():
    results = json.loads((ROOT / "benchmarks" / "results" / "demo-methods.json").read_text())
    shipped = json.loads((ROOT / "vllm_merge" / "search" / FILE).read_text())
    assert shipped == table(results), (
        "make it anew: python -m vllm_merge.search.evidence benchmarks/results/demo-methods.json"
    )
    recorded = {(row["method"], row["space"], row["kept"]) for row in results["rows"]}
    assert {(row["method"], row["space"], row["kept"]) for row in shipped["methods"]} <= recorded
