# SPDX-License-Identifier: Apache-2.0
"""Experiments in a recipe file: what a short one means, and what every mistake is told with."""

import textwrap
from datetime import UTC, datetime

import pytest

from vllm_merge.errors import UserInputError
from vllm_merge.methods.registry import default_registry
from vllm_merge.recipe.json_schema import recipe_schema
from vllm_merge.recipe.loading import parse_recipes
from vllm_merge.recipe.problems import RecipeError

HEAD = """\
version: 1
adapters: {a: {path: ./a}, b: {path: ./b}}
recipes:
  one: {merge_method: ties, adapters: [{adapter: a}, {adapter: b}]}
  two: {merge_method: linear, adapters: [{adapter: a}, {adapter: b}]}
aliases: {assistant: one}
experiments:
"""
FIRST = HEAD.count("\n") + 1  # the line of what follows


def read(tmp_path, text):
    return parse_recipes(HEAD + textwrap.indent(textwrap.dedent(text), "  "), tmp_path / "r.yaml", default_registry())


def test_two_methods_on_the_same_adapters_are_six_lines(tmp_path):
    """The experiment itself is one of them."""
    text = """\
version: 1
recipes:
  one: {merge_method: ties, adapters: &both [{adapter: a}, {adapter: b}]}
  two: {merge_method: linear, adapters: *both}
experiments:
  ab: {arms: {one: 50, two: 50}}
"""
    assert len(text.splitlines()) == 6
    found = parse_recipes(text, tmp_path / "r.yaml", default_registry(), registered=["a", "b"]).experiments["ab"]
    assert found.weights == {"one": 0.5, "two": 0.5}
    assert (found.control_arm, found.coverage, found.unit) == ("one", 1.0, "safety_identifier")
    assert found.runs_at(datetime.now(UTC))


def test_everything_that_can_be_said(tmp_path):
    recipes = read(
        tmp_path,
        """\
        ab:
          arms: {one: 2, plain: {serve: base, weight: 1}, raw: {serve: a, weight: 1}}
          alias: assistant
          control: one
          unit: {header: X-User}
          coverage: 0.1
          holdout: 0.05
          namespace: {name: chat, range: [0, 0.5]}
          seed: "2026"
          start: 2026-01-31T09:00:00Z
          end: 2026-02-28T09:00:00+02:00
          primary: {metric: thumb, direction: decrease}
          guardrails:
            - {metric: errors, max: 0.01}
            - {metric: first_token, quantile: 0.99, max: 2, max_increase: 0.2}
            - {metric: length, max_decrease: 0.3, max_increase: 0.3}
        """,
    )
    found = recipes.experiments["ab"]
    assert found.weights == {"one": 0.5, "plain": 0.25, "raw": 0.25}
    assert [rail.name for rail in found.guardrails] == ["errors", "first_token_p99", "length"]
    assert found.unit == {"header": "x-user"}
    assert not found.runs_at(datetime(2026, 1, 1, tzinfo=UTC))
    assert found.runs_at(datetime(2026, 2, 28, 6, tzinfo=UTC))
    assert not found.runs_at(datetime(2026, 2, 28, 7, tzinfo=UTC))
    assert recipes.lines["experiments.ab"] == FIRST


ARMS = "arms: {one: 1, two: 1}"
WRONG = {
    "one arm": ("ab: {arms: {one: 1}}", "ab.arms: has fewer than two arms"),
    "no arms": ("ab: {}", "ab.arms: is missing; give each arm's weight"),
    "arms as a list": ("ab: {arms: [one, two]}", "ab.arms: is ['one', 'two']; arms are {NAME: WEIGHT"),
    "variants": (f"ab: {{{ARMS}, variants: {{one: 1}}}}", "ab.variants: unknown key; the key is `arms`"),
    "a key": (f"ab: {{{ARMS}, coverge: 0.5}}", "ab.coverge: unknown key, did you mean 'coverage'?"),
    "a negative weight": ("ab: {arms: {one: -1, two: 1}}", "is -1.0; allowed is at least 0"),
    "no weight": ("ab: {arms: {one: 0, two: 0}}", "ab.arms: has no weight above 0"),
    "an infinite weight": ("ab: {arms: {one: .inf, two: 1}}", "ab.arms.one.weight: is inf; expected a finite number"),
    "a word for a weight": ("ab: {arms: {one: half, two: 1}}", "has one: 'half'; an arm is NAME: WEIGHT"),
    "an unknown arm": ("ab: {arms: {one: 1, tow: 1}}", "ab.arms.tow: no recipe or adapter 'tow', did you mean 'two'?"),
    "an alias as arm": ("ab: {arms: {one: 1, assistant: 1}}", "'assistant' is an alias, which may move; name what it"),
    "only the base": (
        "ab: {arms: {x: {serve: base, weight: 1}, y: {serve: base, weight: 1}}}",
        "ab.arms: serve the base model alone",
    ),
    "control": (f"ab: {{{ARMS}, control: tow}}", "ab.control: no arm 'tow', did you mean 'two'? (arms: one, two)"),
    "alias": (f"ab: {{{ARMS}, alias: assistent}}", "ab.alias: no alias 'assistent', did you mean 'assistant'?"),
    "control is not what the alias stands for": (
        f"ab: {{{ARMS}, alias: assistant, control: two}}",
        "ab.alias: 'assistant' stands for 'one', but control serves 'two'",
    ),
    "coverage": (f"ab: {{{ARMS}, coverage: 10}}", "ab.coverage: is 10; allowed is at most 1"),
    "unit": (f"ab: {{{ARMS}, unit: session}}", "ab.unit: is 'session'; allowed are safety_identifier, user"),
    "header": (f'ab: {{{ARMS}, unit: {{header: "x y"}}}}', "ab.unit: has the header 'x y'; a header's name is"),
    "start": (
        f"ab: {{{ARMS}, start: tomorrow}}",
        "ab.start: is 'tomorrow'; a moment is written as 2026-01-31T09:00:00Z",
    ),
    "no offset": (f"ab: {{{ARMS}, start: 2026-01-31T09:00:00}}", "ab.start: is '2026-01-31T09:00:00'; a moment"),
    "end before start": (
        f'ab: {{{ARMS}, start: "2026-02-01T00:00:00Z", end: "2026-01-01T00:00:00Z"}}',
        "ab.end: is 2026-01-01T00:00:00+00:00; it must be later than start",
    ),
    "range": (f"ab: {{{ARMS}, namespace: {{name: n, range: [0.5, 0.2]}}}}", "a range is [START, END] with 0 <= START"),
    "a guardrail that bounds nothing": (f"ab: {{{ARMS}, guardrails: [{{metric: errors}}]}}", "has no bound; give max"),
    "more errors as the aim": (
        f"ab: {{{ARMS}, primary: {{metric: errors}}}}",
        "primary: more errors would win; add direction: decrease",
    ),
    "a quantile of errors": (
        f"ab: {{{ARMS}, guardrails: [{{metric: errors, quantile: 0.9, max: 1}}]}}",
        "guardrails[0].quantile: is for latencies (first_token, gap, seconds)",
    ),
    "a metric that nobody measures": (
        f"ab: {{{ARMS}, guardrails: [{{metric: tokens, max: 1}}]}}",
        "ab.guardrails[0].metric: is 'tokens'; allowed is 'errors', 'refusals'",
    ),
    "one guardrail twice": (
        f"ab: {{{ARMS}, guardrails: [{{metric: errors, max: 1}}, {{metric: errors, max_increase: 1}}]}}",
        "bounds errors again; put all its bounds in one guardrail",
    ),
    "a name that is taken": (f"one: {{{ARMS}}}", "experiments.one: the name 'one' is that of a recipe too"),
    "ranges that overlap": (
        f"""\
        x: {{{ARMS}, namespace: {{name: n, range: [0, 0.5]}}}}
        ab: {{{ARMS}, namespace: {{name: n, range: [0.4, 1]}}}}
        """,
        "ab.namespace.range: overlaps that of x, [0.0, 0.5]",
    ),
    "two behind one alias": (
        f"""\
        x: {{{ARMS}, alias: assistant}}
        ab: {{{ARMS}, alias: assistant}}
        """,
        "ab.alias: x is behind 'assistant' too; give both one namespace",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_is_told_with_its_line(tmp_path, case):
    text, says = WRONG[case]
    with pytest.raises(RecipeError) as caught:
        read(tmp_path, text)
    assert says in str(caught.value)
    line = FIRST + next(i for i, row in enumerate(textwrap.dedent(text).splitlines()) if row.startswith(("ab", "one")))
    assert all(problem.line == line for problem in caught.value.problems)


@pytest.mark.parametrize(
    "second",
    [
        f"{{{ARMS}, alias: assistant, namespace: {{name: n, range: [0.5, 1]}}}}",
        f"{{{ARMS}, namespace: {{name: other, range: [0, 1]}}}}",
        f'{{{ARMS}, alias: assistant, start: "2027-01-01T00:00:00Z"}}',
    ],
)
def test_experiments_that_share_nobody_stand_side_by_side(tmp_path, second):
    first = f'{{{ARMS}, alias: assistant, namespace: {{name: n, range: [0, 0.5]}}, end: "2027-01-01T00:00:00Z"}}'
    assert len(read(tmp_path, f"x: {first}\nab: {second}\n").experiments) == 2


def test_an_adapter_that_comes_later_may_not_take_an_experiment_s_name(tmp_path):
    recipes = read(tmp_path, f"ab: {{{ARMS}}}")
    with pytest.raises(UserInputError, match="'ab'"):
        recipes.with_adapters({"ab": recipes.adapters["a"]})


def test_the_schema_knows_experiments():
    schema = recipe_schema(default_registry())
    experiment = schema["$defs"]["Experiment"]["properties"]
    assert schema["properties"]["experiments"]["additionalProperties"]["$ref"].endswith("/Experiment")
    assert experiment["arms"]["minProperties"] == 2
    assert {"alias", "unit", "namespace", "guardrails", "primary"} <= experiment.keys()
    assert all("description" in experiment[key] for key in ("alias", "unit", "coverage", "holdout", "start"))


def test_a_shadow_names_arms_of_its_experiment_and_is_bounded(tmp_path):
    read(tmp_path, "ab: {arms: {one: 1, two: 0}, shadow: {}}")
    found = read(tmp_path, "ab: {arms: {one: 1, two: 0}, shadow: {share: 1, arms: [two], compare: [answers]}}")
    shadow = found.experiments["ab"].shadow
    assert (shadow.share, shadow.arms, shadow.at_once, shadow.compare) == (1, ["two"], 2, ["answers"])


@pytest.mark.parametrize(
    ("shadow", "message"),
    [
        ("{arms: [tow]}", "shadow.arms[0]: no arm 'tow', did you mean 'two'"),
        ("{arms: []}", "shadow.arms"),
        ("{share: 1.5}", "shadow.share"),
        ("{at_once: 0}", "shadow.at_once"),
        ("{busy_at: 0}", "shadow.busy_at"),
        ("{compare: [text]}", "shadow.compare"),
        ("{compare: []}", "shadow.compare"),
        ("{judge: http://x}", "shadow.judge"),
        ("{compare: [judge]}", "shadow.compare: has judge without answers"),
    ],
)
def test_a_wrong_shadow_is_told_with_its_key(tmp_path, shadow, message):
    with pytest.raises(RecipeError) as caught:
        read(tmp_path, f"ab: {{arms: {{one: 1, two: 1}}, shadow: {shadow}}}")
    assert f"experiments.ab.{message}" in str(caught.value)
