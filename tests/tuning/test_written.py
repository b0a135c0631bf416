# SPDX-License-Identifier: Apache-2.0
"""The recipe file that is left behind: what it takes over from the one that it began with, and what not."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.adapters_in_memory import SHAPES, random_adapter
from vllm_merge import UserInputError, load_recipes
from vllm_merge.adapters.factors import natural_key
from vllm_merge.tuning.learner import Learned
from vllm_merge.tuning.methods import METHODS
from vllm_merge.tuning.written import Writer

FILE = """\
version: 1
base_model: org/base
adapters:
  a: {path: ./a}
  hub: {path: org/name, revision: main}
  unused: {path: ./unused}
recipes:
  earlier: {merge_method: linear, adapters: [{adapter: a}], load: lazy}
  r:
    merge_method: linear
    adapters: [{adapter: earlier}, {adapter: hub, parameters: {weight: 0.5}}]
    precondition: [norm_cap]
    parameters: {lambda: 2, weight: 0.3}
    rank: 8
    seed: 3
    on_miss: fallback
    fallback: unused
    safety: {floor: 0.5, score: 0.9}
"""
MODULES = tuple(sorted(SHAPES, key=natural_key))


def writer(tmp_path: Path, method: str, adapters) -> Writer:
    (tmp_path / "r.yaml").write_text(FILE, encoding="utf-8")
    start = SimpleNamespace(plan=SimpleNamespace(name="r"), adapters=adapters, modules=MODULES)
    return Writer(load_recipes(tmp_path / "r.yaml"), start, METHODS[method], tmp_path / "deep" / "out", ["Told."])


@pytest.fixture
def adapters():
    return (random_adapter("earlier", 2, 1), random_adapter("hub", 3, 2))


WEIGHTS = torch.tensor([[0.7, 1.5]] * len(MODULES), dtype=torch.float64)


def test_a_sum(tmp_path: Path, adapters) -> None:
    path = writer(tmp_path, "nsc", adapters).write(Learned(weights=WEIGHTS), {"floor": 0.4})
    assert path.read_text(encoding="utf-8").startswith("# Told.\nversion: 1\n")
    file = load_recipes(path)
    assert file.base_model == "org/base"
    assert {name: entry.path for name, entry in file.adapters.items()} == {"a": str(tmp_path / "a"), "hub": "org/name"}
    assert file.adapters["hub"].revision == "main"
    assert "path: ../../a" in path.read_text(encoding="utf-8")
    assert list(file.recipes) == ["earlier", "r-nsc"]
    assert file.recipes["earlier"].load == "lazy"
    recipe = file.recipes["r-nsc"]
    assert (recipe.merge_method, recipe.parameters, recipe.rank, recipe.seed) == ("task_arithmetic", {}, 8, 3)
    assert [item.parameters["weight"] for item in recipe.adapters] == [0.7, 1.5]
    assert recipe.precondition == [{"norm_cap": {}}]
    assert (recipe.on_miss, recipe.fallback) == ("wait", None)
    assert recipe.safety is not None
    assert (recipe.safety.floor, recipe.safety.score) == (0.4, None)


def test_the_recipes_own_method(tmp_path: Path, adapters) -> None:
    recipe = load_recipes(writer(tmp_path, "lorahub", adapters).write(Learned(weights=WEIGHTS), None)).recipes[
        "r-lorahub"
    ]
    assert (recipe.merge_method, recipe.parameters, recipe.safety) == ("linear", {"lambda": 2}, None)
    assert [item.parameters for item in recipe.adapters] == [{"weight": 0.7}, {"weight": 1.5}]


def test_corrected_adapters(tmp_path: Path, adapters) -> None:
    made = writer(tmp_path, "ssr", adapters)
    file = load_recipes(made.write(Learned(adapters=adapters, scale=2.5), None))
    assert {n: e.path for n, e in file.adapters.items()} == {
        f"{name}-ssr": str(tmp_path / "deep" / "out" / "adapters" / name) for name in ("earlier", "hub")
    }
    recipe = file.recipes["r-ssr"]
    assert (recipe.merge_method, recipe.parameters, recipe.precondition) == ("task_arithmetic", {"lambda": 2.5}, [])
    made.write(Learned(adapters=adapters[:1], scale=1.0), None)  # in the place of the earlier ones
    assert [path.name for path in (tmp_path / "deep" / "out" / "adapters").iterdir()] == ["earlier"]
    assert sorted(path.name for path in (tmp_path / "deep" / "out").iterdir()) == ["adapters", "recipe.yaml"]


def test_nothing_learned_is_the_recipe_as_it_was(tmp_path: Path, adapters) -> None:
    recipe = load_recipes(writer(tmp_path, "ssr", adapters).write(Learned(), None)).recipes["r-ssr"]
    assert (recipe.merge_method, recipe.parameters) == ("linear", {"lambda": 2, "weight": 0.3})
    assert recipe.adapters[1].parameters == {"weight": 0.5}


def test_a_file_that_would_be_too_large_is_said_before(
    tmp_path: Path, adapters, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = writer(tmp_path, "nsc", adapters)
    for per in ("adapter", "layer", "module", None):
        made.check(per)
    monkeypatch.setattr("vllm_merge.tuning.written.MAX_BYTES", 700)
    made.check("adapter")
    with pytest.raises(UserInputError, match=r"bytes, and a recipe file has at most 700; choose a coarser --per"):
        made.check("module")
    assert not (tmp_path / "deep").exists()
