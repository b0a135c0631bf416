# SPDX-License-Identifier: Apache-2.0
"""What a right recipe file becomes."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vllm_merge.errors import UserInputError
from vllm_merge.recipe.file import RecipeFile
from vllm_merge.recipe.loading import load_recipes, parse_recipes
from vllm_merge.recipe.protocols import Registry
from vllm_merge.recipe.schema import AdapterEntry
from vllm_merge.recipe.yaml_tree import parse_yaml

Load = Callable[[str], RecipeFile]

FULL = """\
version: 1
base_model: org/base
adapters:
  sql: {path: ./adapters/../sql}
  code: {path: org/code, revision: 4f2c}
recipes:
  first:
    merge_method: ties
    space: delta
    adapters:
      - {adapter: sql, parameters: {weight: 0.6, density: [1, 0.7, 2e-1]}}
      - {adapter: code, parameters: {weight: [{filter: mlp, value: 0.5}, {value: 0.3}]}}
    parameters: {lambda: 0.6, normalize: true}
    rank: {energy: 0.99}
    load: lazy
    seed: 7
  second: {merge_method: linear, adapters: [{adapter: first}, {adapter: sql}]}
aliases: {assistant: second, raw: sql}
"""


def test_everything_at_once(load: Load) -> None:
    file = load(FULL)
    assert file.base_model == "org/base"
    assert file.adapters["sql"].path == "/files/sql"
    assert (file.adapters["code"].path, file.adapters["code"].revision) == ("org/code", "4f2c")
    first = file.recipes["first"]
    assert (first.merge_method, first.space, first.load, first.seed, first.rank) == (
        "ties",
        "delta",
        "lazy",
        7,
        {"energy": 0.99},
    )
    assert first.adapters[0].parameters == {"weight": 0.6, "density": [1, 0.7, 0.2]}
    assert first.adapters[1].parameters == {"weight": [{"filter": "mlp", "value": 0.5}, {"filter": None, "value": 0.3}]}
    second = file.recipes["second"]
    assert (second.space, second.rank, second.load, second.seed, second.parameters) == (None, "auto", "eager", 0, {})


def test_names_and_order(load: Load) -> None:
    file = load(FULL)
    assert file.target("assistant") == "second"
    assert file.target("raw") == "sql"
    assert file.stage_order("second") == ["first", "second"]
    with pytest.raises(
        UserInputError,
        match=r"^/files/r.yaml: no recipe or adapter 'frist', did you mean 'first'\? \(known: first, sec",
    ):
        file.target("frist")


def test_a_shared_recipe_is_one_stage(load: Load) -> None:
    file = load(
        "version: 1\nadapters: {x: {path: x}}\nrecipes:\n"
        "  top: {merge_method: linear, adapters: [{adapter: left}, {adapter: right}]}\n"
        "  left: {merge_method: linear, adapters: [{adapter: base}]}\n"
        "  right: {merge_method: linear, adapters: [{adapter: base}]}\n"
        "  base: {merge_method: linear, adapters: [{adapter: x}]}\n"
    )
    assert file.stage_order("top") == ["base", "left", "right", "top"]


def test_relative_paths_are_the_files(tmp_path: Path, registry: Registry) -> None:
    (tmp_path / "org/code").mkdir(parents=True)
    text = "version: 1\nadapters: {a: {path: sub/x/y}, b: {path: /abs/b}, c: {path: org/code}, d: {path: plain}}"
    (tmp_path / "r.yaml").write_text(text)
    file = load_recipes(tmp_path / "r.yaml", registry)
    assert {name: entry.path for name, entry in file.adapters.items()} == {
        "a": str(tmp_path / "sub/x/y"),  # two slashes: not the name of a Hub repository
        "b": "/abs/b",
        "c": str(tmp_path / "org/code"),  # a folder that is there wins over a Hub name
        "d": str(tmp_path / "plain"),
    }


def test_registered_adapters_can_be_used(registry: Registry) -> None:
    text = "version: 1\nrecipes: {r: {merge_method: linear, adapters: [{adapter: served}]}}"
    file = parse_recipes(text, Path("r.yaml"), registry, registered=["served"])
    complete = file.with_adapters({"served": AdapterEntry(path="/a")})
    assert complete.adapters["served"].path == "/a"
    with pytest.raises(UserInputError, match="the name 'served' is that of a registered adapter too; rename one"):
        complete.with_adapters({"served": AdapterEntry(path="/b")})


def test_known_preconditions_are_accepted(registry: Registry) -> None:
    text = (
        "version: 1\nadapters: {a: {path: a}}\n"
        "recipes: {r: {merge_method: linear, adapters: [{adapter: a}], precondition: [p, {q: {mads: 2}}, {q: }]}}"
    )
    seen = []
    found = parse_recipes(text, Path("r.yaml"), registry, check_precondition=seen.append).recipes["r"].precondition
    assert found == seen == [{"p": {}}, {"q": {"mads": 2}}, {"q": {}}]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1.", 1.0),
        (".5", 0.5),
        ("-3", -3),
        ("010", 10),
        ("0x1F", 31),
        ("0o17", 15),
        ("1_000", "1_000"),
        ("yes", "yes"),
        ("on", "on"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("true", True),
        ("~", None),
        ("'1'", "1"),
        ('"true"', "true"),
    ],
)
def test_scalars_are_yaml_1_2(text: str, value: object) -> None:
    found = parse_yaml(f"key: {text}", Path("r.yaml")).data["key"]
    assert found == value
    assert type(found) is type(value)


def test_aliases_are_values() -> None:
    tree = parse_yaml("a: &p {weight: 1}\nb: *p", Path("r.yaml"))
    assert tree.data == {"a": {"weight": 1}, "b": {"weight": 1}}
    assert tree.line(("b", "weight", "deeper")) == 1  # where it is written


def test_the_package_does_not_import_torch() -> None:
    code = (
        "import importlib.util, sys, types\n"
        "package = types.ModuleType('vllm_merge'); package.__path__ = [sys.argv[1]]\n"
        "sys.modules['vllm_merge'] = package\n"
        "import vllm_merge.recipe.loading, vllm_merge.recipe.plan, vllm_merge.recipe.json_schema, "
        "vllm_merge.recipe.bounds\n"
        "assert 'torch' not in sys.modules\n"
    )
    package = Path(__file__).parents[2] / "vllm_merge"
    subprocess.run([sys.executable, "-c", code, str(package)], check=True)
