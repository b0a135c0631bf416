# SPDX-License-Identifier: Apache-2.0
"""Every mistake a recipe file can have: the exact message, with its line and key."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from vllm_merge.recipe.file import RecipeFile
from vllm_merge.recipe.loading import load_recipes
from vllm_merge.recipe.problems import RecipeError
from vllm_merge.recipe.protocols import Registry
from vllm_merge.recipe.values import NAME_RULE

Load = Callable[[str], RecipeFile]

HEAD = """\
version: 1
adapters:
  sql: {path: ./sql}
  code: {path: ./code}
"""

# name -> (text, messages: each is what follows "/files/r.yaml:")
WRONG: dict[str, tuple[str, list[str]]] = {
    "empty": ("", ["1: is empty; a recipe file begins with `version: 1`"]),
    "not a mapping": ("- 1", ["1: is not a mapping; a recipe file begins with `version: 1`"]),
    "not YAML": (
        "version: 1\nadapters: {a: [}",
        ["2: not valid YAML: while parsing a flow node expected the node content, but found '}'"],
    ),
    "two documents": (
        "version: 1\n---\nversion: 1",
        ["2: not valid YAML: expected a single document in the stream but found another document"],
    ),
    "no version": ("adapters: {}", ["1: version: is missing; begin the file with `version: 1`"]),
    "other version": ("version: 2", ["1: version: is 2; allowed is 1"]),
    "duplicate key": (
        "version: 1\nrecipes: {}\nrecipes: {}",
        ["3: recipes: is given twice, first on line 2; remove one"],
    ),
    "duplicate adapter": (
        "version: 1\nadapters:\n  sql: {path: a}\n  sql: {path: b}",
        ["4: adapters.sql: is given twice, first on line 3; remove one"],
    ),
    "tag": (
        "version: !!python/object:os.system 1",
        ["1: version: has the tag tag:yaml.org,2002:python/object:os.system; tags are not allowed"],
    ),
    "merge key": (
        "version: 1\nadapters:\n  a: &a {path: x}\n  b:\n    <<: *a",
        ["5: adapters.b: uses a merge key (<<), which is not supported; repeat the keys"],
    ),
    "a tab": ("version: 1\nrecipes:\n\ta: {}", ["3: not valid YAML: the line is indented with a tab; use spaces"]),
    "indentation": (
        "version: 1\nrecipes:\n  a: {}\n   b: {}",
        [
            "4: not valid YAML: the line is indented differently from its neighbours; "
            "keys of one mapping begin in the same column"
        ],
    ),
    "undefined alias": ("version: 1\naliases: *x", ["2: not valid YAML: found undefined alias 'x'"]),
    "alias of itself": ("version: 1\nadapters: &a\n  x: *a", ["2: has more than 32 levels, aliases expanded"]),
    "unknown top key": (
        "version: 1\nadapter: {}",
        [
            "2: adapter: unknown key, did you mean 'adapters'? (allowed: version, base_model, adapters, "
            "recipes, aliases, experiments)"
        ],
    ),
    "mergekit file": (
        "merge_method: ties\nmodels:\n  - model: a\ndtype: bfloat16\nversion: 1",
        [
            "1: merge_method: unknown key; it belongs to a recipe: put it under `recipes:`, then the recipe's name",
            "2: models: unknown key; mergekit's `models:` is `adapters:` here, with items {adapter: NAME, "
            "parameters: {…}}, inside a recipe",
            "4: dtype: unknown key; the server's dtype is used; offline, give `vllm-merge merge --dtype`",
        ],
    ),
    "mergekit recipe": (
        HEAD + "recipes:\n  r:\n    merge_method: linear\n    models:\n      - {model: sql}",
        [
            "6: recipes.r.adapters: is missing",
            "8: recipes.r.models: unknown key; mergekit's `models:` is `adapters:` here, with items "
            "{adapter: NAME, parameters: {…}}",
        ],
    ),
    "mergekit item": (
        HEAD + "recipes:\n  r:\n    merge_method: linear\n    adapters:\n      - {adapter: sql, weight: 1}",
        ["9: recipes.r.adapters[0].weight: unknown key; put it under `parameters:`"],
    ),
    "no path": (
        "version: 1\nadapters:\n  a: {revision: x}",
        ["3: adapters.a.path: is missing; give the adapter's folder or Hub repository"],
    ),
    "path is a number": (
        "version: 1\nadapters:\n  a: {path: 12}",
        ["3: adapters.a.path: is 12; expected text; quote it"],
    ),
    "adapter is text": ("version: 1\nadapters:\n  a: ./sql", ["3: adapters.a: is './sql'; expected a mapping"]),
    "section is empty": ("version: 1\nrecipes:", ["2: recipes: is empty; expected a mapping"]),
    "revision of a folder": (
        "version: 1\nadapters:\n  a:\n    path: ./a\n    revision: main",
        ["5: adapters.a.revision: ./a is a folder; a revision is for Hub repositories (org/name) only"],
    ),
    "Hub repository without revision": (
        "version: 1\nadapters:\n  a: {path: org/a}",
        [
            "3: adapters.a.revision: is missing; org/a is no folder here, and a Hub repository needs a revision: "
            "best a commit, which never changes"
        ],
    ),
    "escape beyond Unicode": (
        'version: 1\nbase_model: "\\UFFFFFFFF"',
        ["1: not valid YAML: an escape such as \\U names no character"],
    ),
    "long key": (
        f"version: 1\n{'k' * 300}: 1",
        [
            f"2: {'k' * 100}…{'k' * 100}: unknown key (allowed: version, base_model, adapters, recipes, aliases, experiments)",
        ],
    ),
    "version is a word": ("version: one", ["1: version: is 'one'; allowed is 1"]),
    "adapters is a list": ("version: 1\nadapters: [sql]", ["2: adapters: is ['sql']; expected a mapping"]),
    "base model is a number": ("version: 1\nbase_model: 7", ["2: base_model: is 7; expected text; quote it"]),
    "key that is a list": ("version: 1\n? [a, b]\n: 1", ["2: has a key that is not text"]),
    "bad name": (
        "version: 1\nadapters:\n  a@b: {path: x}",
        [f"3: adapters.a@b: 'a@b' is not a name; a name is {NAME_RULE}"],
    ),
    "long name": (
        f"version: 1\naliases:\n  {'x' * 65}: y",
        [
            f"3: aliases.{'x' * 65}: '{'x' * 65}' is not a name; a name is {NAME_RULE}",
            f"3: aliases.{'x' * 65}: no recipe or adapter 'y' (known: none)",
        ],
    ),
    "name taken": (
        HEAD + "aliases:\n  sql: code",
        ["6: aliases.sql: the name 'sql' is that of an adapter too; rename one of the two"],
    ),
    "alias of nothing": (
        HEAD + "aliases: {prod: sqll}",
        ["5: aliases.prod: no recipe or adapter 'sqll', did you mean 'sql'? (known: sql, code)"],
    ),
    "alias of an alias": (
        HEAD + "aliases: {a: sql, b: a}",
        ["5: aliases.b: 'a' is an alias; aliases point to recipes or adapters"],
    ),
}


def recipe(body: str) -> str:
    """HEAD and a recipe r whose lines, from line 7 on, are `body`."""
    return HEAD + "recipes:\n  r:\n" + "\n".join(f"    {line}" for line in body.splitlines())


def linear(more: str = "", item: str = "{adapter: sql}") -> str:
    """A recipe whose item is on line 8 and the rest from line 9 on."""
    return recipe(f"merge_method: linear\nadapters: [{item}]\n{more}")


FILTER_RULE = "a list of filters has items {filter: TEXT, value: …} or {value: …}"
WRONG_RECIPES: dict[str, tuple[str, list[str]]] = {
    "no method": (
        recipe("adapters: [{adapter: sql}]"),
        ["6: recipes.r.merge_method: is missing; `vllm-merge methods` lists the merge methods"],
    ),
    "unknown method": (
        recipe("merge_method: tiez\nadapters: [{adapter: sql}]"),
        ["7: recipes.r.merge_method: unknown merge method 'tiez' (known: linear, ties)"],
    ),
    "no adapters": (
        recipe("merge_method: linear\nadapters: []"),
        ["8: recipes.r.adapters: is []; expected at least 1 item"],
    ),
    "unknown adapter": (
        linear(item="{adapter: sqk}"),
        [
            "8: recipes.r.adapters[0].adapter: no registered adapter or recipe 'sqk', did you mean 'sql'? "
            "(known: sql, code)"
        ],
    ),
    "alias as input": (
        linear(item="{adapter: prod}") + "\naliases: {prod: sql}",
        ["8: recipes.r.adapters[0].adapter: 'prod' is an alias, which may move; name what it points to, 'sql'"],
    ),
    "uses itself": (linear(item="{adapter: r}"), ["6: recipes.r: recipes use each other in a circle: r -> r"]),
    "circle of three": (
        "version: 1\nrecipes:\n"
        "  a: {merge_method: linear, adapters: [{adapter: b}]}\n"
        "  b: {merge_method: linear, adapters: [{adapter: c}]}\n"
        "  c: {merge_method: linear, adapters: [{adapter: a}]}",
        ["3: recipes.a: recipes use each other in a circle: a -> b -> c -> a"],
    ),
    "space": (
        linear("space: knots"),
        ["9: recipes.r.space: 'linear' is not defined in space 'knots'; allowed: core, delta"],
    ),
    "precondition": (
        linear("precondition: [norm_cap]"),
        ["9: recipes.r.precondition[0]: unknown precondition 'norm_cap' (known: none)"],
    ),
    "precondition of another form": (
        linear("precondition: [{norm_cap: 3}]"),
        [
            "9: recipes.r.precondition[0]: is {'norm_cap': 3}; a precondition is a name, or {name: {parameter: value}}",
        ],
    ),
    "unknown parameter": (
        linear("parameters: {densty: 1}"),
        ["9: recipes.r.parameters.densty: linear has no parameter 'densty'"],
    ),
    "parameter of the recipe": (
        linear(item="{adapter: sql, parameters: {lambda: 1}}"),
        ["8: recipes.r.adapters[0].parameters.lambda: 'lambda' is a parameter of the recipe"],
    ),
    "weight not finite": (
        linear(item="{adapter: sql, parameters: {weight: .inf}}"),
        ["8: recipes.r.adapters[0].parameters.weight: is inf; numbers must be finite"],
    ),
    "weight is NaN in a gradient": (
        linear(item="{adapter: sql, parameters: {weight: [1, .nan]}}"),
        ["8: recipes.r.adapters[0].parameters.weight: is nan; numbers must be finite"],
    ),
    "weight too large to be finite": (
        linear(item="{adapter: sql, parameters: {weight: 1e999}}"),
        ["8: recipes.r.adapters[0].parameters.weight: is inf; numbers must be finite"],
    ),
    "weight is a word": (
        linear(item="{adapter: sql, parameters: {weight: much}}"),
        ["8: recipes.r.adapters[0].parameters.weight: weight is 'much'; allowed is a number in its range"],
    ),
    "density out of range in a filter": (
        recipe(
            "merge_method: ties\nadapters:\n- adapter: sql\n  parameters:\n    density: [{filter: mlp, "
            "value: [0.5, 1.5]}, {value: 1}]"
        ),
        ["11: recipes.r.adapters[0].parameters.density: density is 1.5; allowed is a number in its range"],
    ),
    "empty gradient": (
        linear("parameters: {weight: []}"),
        ["9: recipes.r.parameters.weight: is an empty list; a gradient has at least one number"],
    ),
    "word in a gradient": (
        linear("parameters: {weight: [1, x]}"),
        ["9: recipes.r.parameters.weight: is a list with 'x' in it; a gradient over depth is a list of numbers"],
    ),
    "bad filter item": (
        linear("parameters: {weight: [{filtr: mlp, value: 1}]}"),
        [f"9: recipes.r.parameters.weight: has the item {{'filtr': 'mlp', 'value': 1}}; {FILTER_RULE}"],
    ),
    "bad filter": (
        linear("parameters: {weight: [{filter: 3, value: 1}]}"),
        ["9: recipes.r.parameters.weight: has the filter 3; a filter is text that the module's name contains, or '*'"],
    ),
    "mapping as parameter": (
        linear("parameters: {weight: {a: 1}}"),
        [
            "9: recipes.r.parameters.weight: is {'a': 1}; allowed are a number, a word, true or false, a "
            "list of numbers, or a list of filters"
        ],
    ),
    "list for one value": (
        recipe("merge_method: ties\nadapters: [{adapter: sql}]\nparameters: {normalize: [1, 0]}"),
        [
            "9: recipes.r.parameters.normalize: is a list; this parameter has one value for the whole "
            "merge, not one per module"
        ],
    ),
    "rank zero": (
        linear("rank: 0"),
        ["9: recipes.r.rank: is 0; allowed are auto, lossless, a whole number of at least 1, or {energy: SHARE}"],
    ),
    "rank word": (
        linear("rank: max"),
        ["9: recipes.r.rank: is 'max'; allowed are auto, lossless, a whole number of at least 1, or {energy: SHARE}"],
    ),
    "energy": (
        linear("rank: {energy: 1.5}"),
        ["9: recipes.r.rank: keeps energy 1.5; allowed is a share above 0 and at most 1"],
    ),
    "load": (linear("load: later"), ["9: recipes.r.load: is 'later'; allowed is 'eager' or 'lazy'"]),
    "on_miss": (
        linear("on_miss: later"),
        ["9: recipes.r.on_miss: is 'later'; allowed is 'wait', 'reject' or 'fallback'"],
    ),
    "on_error": (linear("on_error: ignore"), ["9: recipes.r.on_error: is 'ignore'; allowed is 'stop' or 'degraded'"]),
    "on_error of a lazy recipe": (
        linear("load: lazy\non_error: stop"),
        ["10: recipes.r.on_error: stop has no effect with `load: lazy`, which merges nothing at the start"],
    ),
    "no fallback": (
        linear("on_miss: fallback"),
        ["6: recipes.r.fallback: is missing; name a recipe, an adapter or 'base' (known: sql, code)"],
    ),
    "fallback that is not used": (
        linear("fallback: sql"),
        ["9: recipes.r.fallback: has no effect with `on_miss: wait`; write `on_miss: fallback` or leave it out"],
    ),
    "fallback to itself": (
        linear("on_miss: fallback\nfallback: r"),
        ["10: recipes.r.fallback: is the recipe itself; name another recipe, an adapter or the base model"],
    ),
    "unknown fallback": (
        linear("on_miss: fallback\nfallback: sqk"),
        ["10: recipes.r.fallback: no recipe or adapter 'sqk', did you mean 'sql'? (known: sql, code, base)"],
    ),
    "alias as fallback": (
        linear("on_miss: fallback\nfallback: prod") + "\naliases: {prod: sql}",
        ["10: recipes.r.fallback: 'prod' is an alias, which may move; name what it points to, 'sql'"],
    ),
    "negative seed": (linear("seed: -1"), ["9: recipes.r.seed: is -1; allowed is at least 0"]),
    "seed is text": (linear("seed: '7'"), ["9: recipes.r.seed: is '7'; expected a whole number"]),
    "seed is true": (linear("seed: true"), ["9: recipes.r.seed: is true; expected a whole number"]),
    "several at once": (
        linear("rank: none\nseed: x\nlod: lazy", item="{adaptr: sql}"),
        [
            "8: recipes.r.adapters[0].adapter: is missing",
            "8: recipes.r.adapters[0].adaptr: unknown key, did you mean 'adapter'? (allowed: adapter, parameters)",
            "9: recipes.r.rank: is 'none'; allowed are auto, lossless, a whole number of at least 1, or "
            "{energy: SHARE}",
            "10: recipes.r.seed: is 'x'; expected a whole number",
            "11: recipes.r.lod: unknown key, did you mean 'load'? (allowed: merge_method, space, "
            "adapters, precondition, parameters, continue, rank, load, seed, on_miss, fallback, on_error, safety)",
        ],
    ),
}


@pytest.mark.parametrize("case", {**WRONG, **WRONG_RECIPES})
def test_message(case: str, load: Load) -> None:
    text, messages = {**WRONG, **WRONG_RECIPES}[case]
    with pytest.raises(RecipeError) as caught:
        load(text)
    assert str(caught.value).splitlines() == [f"/files/r.yaml:{message}" for message in messages]


def test_what_surrounds_the_mistakes_is_right(load: Load) -> None:
    """The cases above fail for what they say: without it the same file is accepted."""
    assert load(linear()).recipes["r"].adapters[0].adapter == "sql"
    assert load(HEAD).recipes == {}


def test_many_problems_are_cut(load: Load) -> None:
    with pytest.raises(RecipeError) as caught:
        load("version: 1\n" + "\n".join(f"k{i}: 1" for i in range(30)))
    assert str(caught.value).splitlines()[-1] == "/files/r.yaml: and 10 more"
    assert len(caught.value.problems) == 30


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version: 1\n# \xff", ":2: byte 0xff is not UTF-8"),
        (b"#" * (2**18 + 1), ": is larger than 262,144 bytes; split it"),
        (b"version: 1\na: \x01", ":2: not valid YAML: special characters are not allowed"),
        (b"a: " + b"[" * 20_000, ":1: is nested deeper than 32 levels"),
        (None, ": there is no such file; check the path"),
    ],
)
def test_unreadable_files(content: bytes | None, message: str, tmp_path: Path, registry: Registry) -> None:
    file = tmp_path / "r.yaml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        load_recipes(file, registry)
    assert str(caught.value) == f"{file}{message}"


def test_a_folder_is_no_recipe_file(tmp_path: Path, registry: Registry) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipes(tmp_path, registry)
    assert str(caught.value) == f"{tmp_path}: is a folder; give the recipe file itself"


@pytest.mark.parametrize(
    "line",
    [
        "  r{i}: {{merge_method: linear, adapters: [{{adapter: r{before}}}]}}",  # a chain, which is right
        "  r{i}: {{merge_method: linear, adapters: [{{adapter: x{i}}}]}}",  # each with an unknown adapter
        "  r{i}: {{merge_method: linear, adapters: [{{adapter: r{i}}}]}}",  # each a circle
        "  {name}{i}: 1",  # each of a wrong type
    ],
)
def test_large_files_are_quick(line: str, load: Load) -> None:
    count = 2500
    rows = [line.format(i=i, before=i - 1 if i else "x", name="k" * 60) for i in range(count)]
    text = "version: 1\nadapters: {rx: {path: ./x}}\nrecipes:\n" + "\n".join(rows)
    started = time.process_time()
    try:
        order = load(text).stage_order(f"r{count - 1}")
    except RecipeError as error:
        order = [f"problem {i}" for i in range(len(error.problems))]
    assert len(order) == 200 or order == [f"r{i}" for i in range(count)]
    assert time.process_time() - started < 10


def test_alias_bomb_is_bounded(load: Load) -> None:
    levels = [f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]" for i in range(1, 9)]
    with pytest.raises(RecipeError, match="has more than 100,000 values, aliases expanded"):
        load("version: 1\nl0: &l0 [x]\n" + "\n".join(levels))
