# SPDX-License-Identifier: Apache-2.0
"""The arguments of add_weighted_adapter: the recipe gives the numbers of the installed PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from vllm_merge import Adapter
from vllm_merge.cli.app import app
from vllm_merge.convert import Converted, convert
from vllm_merge.methods.registry import default_registry
from vllm_merge.recipe.problems import RecipeError
from vllm_merge.recipe_files import check_precondition

peft = pytest.importorskip("peft", reason="compares with the installed peft")

ALPHAS = {"x": 8, "y": 4, "z": 16}
SHAPES = {"one": (24, 32), "two": (40, 24)}


class Net(torch.nn.Module):
    """Two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        for name, (d_out, d_in) in SHAPES.items():
            setattr(self, name, torch.nn.Linear(d_in, d_out, bias=False))


def peft_model() -> Any:
    """A model with three adapters of rank 4 and different alphas; z has one of the modules only."""
    torch.manual_seed(0)

    def config(name: str) -> Any:
        modules = ["one"] if name == "z" else list(SHAPES)
        return peft.LoraConfig(r=4, lora_alpha=ALPHAS[name], target_modules=modules, init_lora_weights=False)

    model = peft.get_peft_model(Net(), config("x"), adapter_name="x")
    for name in ("y", "z"):
        model.add_adapter(name, config(name))
    return model


def from_call(call: dict[str, Any], folder: Path, paths: dict[str, str] | None = None) -> Converted:
    file = folder / "call.json"
    file.write_text(json.dumps(call, indent=2), encoding="utf-8")
    return convert(file, default_registry(), check_precondition, adapters=paths)


CALLS: list[dict[str, Any]] = [
    {"weights": [0.5, 0.3, 0.9], "combination_type": "linear"},
    {"weights": [0.5, -0.3, 0.9], "combination_type": "linear"},
    {"weights": [0.5, 0.3, 0.9], "combination_type": "ties", "density": 0.4},
    {
        "weights": [0.5, 0.3, -0.9],
        "combination_type": "ties",
        "density": 0.7,
        "majority_sign_method": "frequency",
    },
    {"weights": [0.5, 0.3, 0.9], "combination_type": "magnitude_prune", "density": 0.6},
    {"weights": [0.7, 0.5, -0.3], "combination_type": "cat"},
    {"weights": [0.7, 0.5, -0.3], "svd_rank": 6},
    {"weights": [0.7, 0.5, 0.3], "combination_type": "svd", "svd_rank": 12, "svd_full_matrices": False},
    {"weights": [0.7, 0.5, 0.3], "combination_type": "ties_svd", "svd_rank": 8, "density": 0.4},
    {
        "weights": [0.7, 0.5, 0.3],
        "combination_type": "ties_svd",
        "svd_rank": 8,
        "density": 0.8,
        "majority_sign_method": "frequency",
    },
    {"weights": [0.7, 0.5, 0.3], "combination_type": "magnitude_prune_svd", "svd_rank": 8, "density": 0.4},
    {"weights": [0.7, 0.5, 0.3], "combination_type": "linear", "density": None},
]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: f"{call.get('combination_type', 'default')}")
def test_the_numbers_of_peft(call: dict[str, Any], tmp_path: Path) -> None:
    model = peft_model()
    model.save_pretrained(tmp_path / "adapters")
    model.base_model.add_weighted_adapter(["x", "y", "z"], adapter_name="merged", **call)
    recipe = tmp_path / "recipe.yaml"
    call = {"adapters": ["x", "y", "z"], "adapter_name": "merged", **call}
    recipe.write_text(from_call(call, tmp_path, {n: f"./adapters/{n}" for n in ALPHAS}).to_yaml(), encoding="utf-8")
    result = CliRunner().invoke(app, ["merge", str(recipe), "-o", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    own = Adapter.from_peft(tmp_path / "out")
    for name in SHAPES:
        expected = getattr(model.base_model.model, name).get_delta_weight("merged")
        assert float((own.factors[name].delta() - expected).norm() / expected.norm()) < 2e-5


def test_a_single_adapter_is_linear(tmp_path: Path) -> None:
    converted = from_call({"adapters": ["x"], "weights": [0.5], "combination_type": "svd"}, tmp_path)
    assert converted.document["recipes"]["merged"]["merge_method"] == "factor_linear"
    assert any("'linear' in place of 'svd'" in note for note in converted.notes)


@pytest.mark.parametrize(
    ("combination", "method"), [("dare_linear", "factor_dare_linear"), ("dare_ties", "factor_dare_ties")]
)
def test_random_rules_say_that_their_draws_differ(combination: str, method: str, tmp_path: Path) -> None:
    call = {"adapters": ["x", "y"], "weights": [1, 1], "combination_type": combination, "density": 0.5}
    converted = from_call(call, tmp_path)
    assert converted.document["recipes"]["merged"]["merge_method"] == method
    assert any("other draws" in note for note in converted.notes)


def test_dare_ties_svd_with_equal_weights(tmp_path: Path) -> None:
    call = {
        "adapters": ["x", "y"],
        "weights": [0.5, 0.5],
        "combination_type": "dare_ties_svd",
        "density": 0.5,
        "svd_rank": 4,
    }
    recipe = from_call(call, tmp_path).document["recipes"]["merged"]
    assert (recipe["merge_method"], recipe["space"], recipe["rank"]) == ("dare_ties", "delta", 4)
    assert recipe["parameters"] == {"density": 0.5, "lambda": 0.5}


GOOD = {"adapters": ["x", "y"], "weights": [0.5, 0.5], "combination_type": "ties", "density": 0.5}


@pytest.mark.parametrize(
    ("change", "line", "message"),
    [
        ({"density": None}, 11, "density: is empty; allowed is a number > 0, ≤ 1"),
        ({"density": 0}, 11, "density: is 0; allowed is a number > 0, ≤ 1"),
        ({"weights": [1]}, 6, "weights: has 1 numbers for 2 adapters; give one per adapter"),
        ({"weights": None}, 6, "weights: is empty; expected a list of 2 finite numbers"),
        ({"adapters": []}, 2, "adapters: is []; expected a list of at least one name"),
        ({"adapters": ["a/b", "y"]}, 3, "adapters[0]: is 'a/b'; a name here is"),
        (
            {"adapters": ["merged", "y"]},
            3,
            "adapters[0]: is 'merged', the name of the result too; give the result another, by --name",
        ),
        ({"combination_type": "tie"}, 10, "combination_type: is 'tie', did you mean 'ties'?; allowed: linear"),
        ({"combination_type": "svd"}, 1, "svd_rank: is not given"),
        ({"combination_type": "svd", "svd_rank": 0}, 12, "svd_rank: is 0; allowed is a whole number"),
        ({"combination_type": "svd", "svd_rank": 4, "svd_clamp": 0.99}, 13, "svd_clamp: cuts entries"),
        ({"majority_sign_method": "most"}, 12, "majority_sign_method: is 'most'; allowed: total, frequency"),
        (
            {"combination_type": "dare_ties_svd", "svd_rank": 4, "weights": [1, 2]},
            10,
            "combination_type: is 'dare_ties_svd', whose signs",
        ),
        ({"densty": 1}, 12, "densty: is not a key of this format, did you mean 'density'?"),
    ],
)
def test_what_is_wrong_or_has_no_meaning(change: dict[str, Any], line: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        from_call({**GOOD, **change}, tmp_path)
    assert f"call.json:{line}: {message}" in str(caught.value)
