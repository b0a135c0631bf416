# SPDX-License-Identifier: Apache-2.0
"""What a plan warns of, and that it is silent about what is right."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.adapters_in_memory import map_factors, random_adapter, zero_adapter
from vllm_merge import Adapter, LoraFactors, load_recipes
from vllm_merge.forecast.cautions import cautions
from vllm_merge.forecast.overlap import Overlap
from vllm_merge.methods.registry import default_registry
from vllm_merge.recipe.plan import make_plan

X, Y = random_adapter("x", 3, 1), random_adapter("y", 5, 2)


def warned(adapters: list[Adapter], tmp_path: Path, own: dict[str, Any] | None = None, **recipe: Any) -> list[str]:
    items = [{"adapter": adapter.name, "parameters": (own or {}).get(adapter.name, {})} for adapter in adapters]
    file = tmp_path / "r.yaml"
    paths = {adapter.name: {"path": str(tmp_path / adapter.name)} for adapter in adapters}
    content = {"r": {"merge_method": "ties", "adapters": items, **recipe}}
    file.write_text(yaml.safe_dump({"version": 1, "adapters": paths, "recipes": content}))
    plan = make_plan(
        load_recipes(file),
        "r",
        registry=default_registry(),
        adapter_hashes={adapter.name: adapter.content_hash for adapter in adapters},
        base_model_hash="",
        max_rank=None,
        dtype="float32",
    )
    modules = {adapter.name: list(adapter.factors) for adapter in adapters}
    return cautions(plan, Overlap(adapters), modules)


def scaled(adapter: Adapter, factor: float, name: str) -> Adapter:
    changed = map_factors(adapter, lambda f: LoraFactors(f.A, f.B * factor))
    return Adapter(name, changed.factors)


def test_what_is_right_is_silent(tmp_path: Path) -> None:
    assert warned([X, Y], tmp_path) == []


def test_norms(tmp_path: Path) -> None:
    (found,) = warned([X, scaled(Y, 12, "big")], tmp_path)
    assert found.startswith("adapter 'big' changes the weights 1")
    assert found.endswith("and is most of their sum; balance them with `weight`")


def test_opposed_unless_the_weights_say_so(tmp_path: Path) -> None:
    against = scaled(X, -1, "against")
    message = "adapters 'x' and 'against' pull against each other (cosine -1.00): they cancel in part"
    assert warned([X, against], tmp_path) == [message]
    nearly = "adapters 'x' and 'against' are nearly the same (cosine 1.00): together they count double"
    assert warned([X, against], tmp_path, {"against": {"weight": -1}}) == [nearly]


def test_alike(tmp_path: Path) -> None:
    (found,) = warned([X, scaled(X, 1, "copy")], tmp_path)
    assert found == "adapters 'x' and 'copy' are nearly the same (cosine 1.00): together they count double"


def test_missing_modules(tmp_path: Path) -> None:
    part = Adapter("part", dict(list(Y.factors.items())[:1]))
    assert warned([X, part], tmp_path) == [
        "not every adapter has all of the 4 modules, and counts as no change where it has none: part lacks 3 "
        "(such as layers.0.up_proj)"
    ]


def test_zero_adapter(tmp_path: Path) -> None:
    found = warned([X, zero_adapter()], tmp_path)
    assert found == ["adapter 'zero' changes no weight: its factors are zero, and it is left out"]


@pytest.mark.parametrize(
    ("density", "trim", "silent"), [([1, 0.2], "global", False), ([1, 0.2], "module", True), (0.5, "global", True)]
)
def test_density_by_module(density: Any, trim: str, silent: bool, tmp_path: Path) -> None:
    expected = (
        "recipe 'r': a density that differs by module is kept module by module, as with `trim: module`; a threshold over "
        "the whole model needs one density"
    )
    found = warned([X, Y], tmp_path, {"x": {"density": density}}, parameters={"trim": trim})
    assert found == ([] if silent else [expected])
