# SPDX-License-Identifier: Apache-2.0
"""mergekit configurations: the recipe gives the golden numbers of mergekit, and says what has no meaning for adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests import golden
from tests.test_golden import relative_error
from vllm_merge import Adapter, LoraFactors, merge
from vllm_merge.convert import Converted, convert
from vllm_merge.methods.registry import default_registry
from vllm_merge.recipe.problems import RecipeError
from vllm_merge.recipe_files import check_precondition

CASES = [entry for entry in golden.entries() if entry["method"].startswith("mergekit_")]
PER_MODEL = ("density", "gamma", "epsilon")


def from_config(config: dict[str, Any] | str, folder: Path) -> Converted:
    file = folder / "config.yaml"
    text = config if isinstance(config, str) else yaml.safe_dump(config, sort_keys=False)
    file.write_text(text, encoding="utf-8")
    return convert(file, default_registry(), check_precondition)


def config_of(entry: golden.Entry) -> dict[str, Any]:
    """The configuration that the entry's parameters are of. Its models are B+adapter0, B+adapter1, …"""
    params = dict(entry["params"])
    method = params.pop("method")
    models: list[dict[str, Any]] = [
        {"model": f"org/B+./adapter{i}", "parameters": {}} for i in range(len(entry["ranks"]))
    ]
    for name in PER_MODEL:
        if name in params and not method.startswith("ram"):
            value = params.pop(name)
            for index, model in enumerate(models):
                model["parameters"][name] = value[index] if isinstance(value, list) else value
    for model, weight in zip(models, entry["weights"] or [None] * len(models), strict=True):
        if weight is not None:
            model["parameters"]["weight"] = weight
    base = "org/B+./adapter0" if method == "slerp" else "org/B"
    return {"merge_method": method, "base_model": base, "models": models, "parameters": params}


@pytest.mark.parametrize("entry", CASES, ids=lambda entry: entry["file"].removesuffix(".safetensors"))
def test_the_numbers_of_mergekit(entry: golden.Entry, tmp_path: Path) -> None:
    """Of slerp and karcher too, for which the golden cases have ΔW as the models."""
    recipe = from_config(config_of(entry), tmp_path).document["recipes"]["merged"]
    adapters, expected = golden.load_case(entry)
    assert [item["adapter"] for item in recipe["adapters"]] == [adapter.name for adapter in adapters]
    own = merge(
        adapters,
        merge_method=recipe["merge_method"],
        space=recipe.get("space"),
        parameters=recipe.get("parameters"),
        adapter_parameters=[item.get("parameters", {}) for item in recipe["adapters"]],
        rank="lossless",
    )
    assert relative_error(own, expected) <= entry["tolerance"]


MODELS = """\
models:
  - model: org/B+org/sql@4f2c
    parameters: {weight: 0.6}
  - model: {model: org/B, lora: {path: ./code}}
    parameters: {weight: [0.2, 0.4]}
"""


def recipe_of(text: str, folder: Path) -> dict[str, Any]:
    recipe: dict[str, Any] = from_config(text, folder).document["recipes"]["merged"]
    return recipe


def test_references_gradients_and_what_is_left_out(tmp_path: Path) -> None:
    text = f"{MODELS}  - model: org/B\nmerge_method: task_arithmetic\nbase_model: org/B\ndtype: bfloat16\n"
    converted = from_config(text, tmp_path)
    assert converted.document["base_model"] == "org/B"
    assert converted.document["adapters"] == {
        "sql": {"path": "org/sql", "revision": "4f2c"},
        "code": {"path": "./code"},
    }
    assert converted.document["recipes"]["merged"] == {
        "merge_method": "task_arithmetic",
        "adapters": [
            {"adapter": "sql", "parameters": {"weight": 0.6}},
            {"adapter": "code", "parameters": {"weight": [0.2, 0.4]}},
        ],
        "parameters": {"lambda": 1.0},
    }
    notes = " ".join(converted.notes)
    for part in (
        "dtype is left out",
        "its weight change is 0",
        "from the folder of the recipe file",
        "is a LoRA adapter",
    ):
        assert part in notes


def test_normalized_task_arithmetic_is_linear(tmp_path: Path) -> None:
    text = f"{MODELS}merge_method: task_arithmetic\nparameters: {{normalize: true, lambda: 0.5}}\n"
    recipe = recipe_of(text, tmp_path)
    assert (recipe["merge_method"], recipe["parameters"]) == ("linear", {"lambda": 0.5})


def test_a_base_model_that_counts_in_linear(tmp_path: Path) -> None:
    """W = (0.6 (W0 + ΔW) + 0.4 W0) / 1 is the base and 0.6 ΔW."""
    text = """\
merge_method: linear
models:
  - {model: org/B+./x, parameters: {weight: 1.5}}
  - {model: org/B, parameters: {weight: 1.0}}
"""
    recipe = recipe_of(text, tmp_path)
    assert len(recipe["adapters"]) == 1
    assert recipe["parameters"] == {"lambda": 0.6}


def test_sums_that_are_divided(tmp_path: Path) -> None:
    text = """\
merge_method: breadcrumbs
models:
  - {model: org/B+./x, parameters: {weight: 1.5, density: 0.9}}
  - {model: org/B+./y, parameters: {weight: 0.5, density: 0.8}}
parameters: {normalize: true, lambda: 3}
"""
    assert recipe_of(text, tmp_path)["parameters"]["lambda"] == 1.5


@pytest.mark.parametrize("method", ["slerp", "nearswap"])
@pytest.mark.parametrize(("order", "first"), [(("x", "y"), "x"), (("y", "x"), "x")])
def test_a_pair_begins_at_the_base_model(method: str, order: tuple[str, str], first: str, tmp_path: Path) -> None:
    models = "".join(f"  - model: org/B+./{name}\n" for name in order)
    text = f"merge_method: {method}\nbase_model: org/B+./x\nmodels:\n{models}parameters: {{t: [0.1, 0.5, 1]}}\n"
    recipe = recipe_of(text, tmp_path)
    assert recipe["merge_method"] == method
    assert recipe["adapters"][0]["adapter"] == first
    assert recipe["parameters"] == {"t": [0.1, 0.5, 1]}


def test_nearswap_is_that_of_the_whole_models(tmp_path: Path) -> None:
    """mergekit's rule, w = min(1, t / max(|a − b|, 1e-6)) and w b + (1 − w) a, of W0 + ΔW_1 and W0 + ΔW_2."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(24, 20, generator=generator, dtype=torch.float64)
    factors = [
        LoraFactors(torch.randn(4, 20, generator=generator), torch.randn(24, 4, generator=generator), 0.02)
        for _ in range(2)
    ]
    a, b = (base + (f.scaling * f.B @ f.A).double() for f in factors)
    share = (0.05 / (a - b).abs().clamp(min=1e-6)).clamp(max=1)
    expected = share * b + (1 - share) * a - base
    text = "merge_method: nearswap\nbase_model: B+./x\nmodels:\n  - model: B+./x\n  - model: B+./y\nparameters: {t: 0.05}\n"
    recipe = recipe_of(text, tmp_path)
    adapters = [Adapter(name, {"q_proj": f}) for name, f in zip("xy", factors, strict=True)]
    own = merge(adapters, merge_method="nearswap", parameters=recipe["parameters"], rank="lossless")
    assert 0.05 < float(share.eq(1).double().mean()) < 0.95
    assert relative_error(own, {"q_proj": expected}) < 1e-5


def test_model_stock_may_turn_around_as_in_mergekit(tmp_path: Path) -> None:
    """Two adapters more than a right angle apart: t = 2 cos θ / (1 + cos θ) is negative, and of their mean."""
    text = "merge_method: model_stock\nbase_model: B\nmodels:\n  - model: B+./x\n  - model: B+./y\n"
    converted = from_config(text, tmp_path)
    recipe = converted.document["recipes"]["merged"]
    assert recipe["parameters"] == {"by": "module", "reverse": True}
    assert any("no bound" in note for note in converted.notes)
    down = torch.eye(2)
    turned = torch.tensor([[-0.5, 0.75**0.5], [-(0.75**0.5), -0.5]])
    adapters = [Adapter(name, {"q_proj": LoraFactors(down, up, 1.0)}) for name, up in (("x", down), ("y", turned))]
    own = merge(adapters, merge_method="model_stock", parameters=recipe["parameters"], rank="lossless")
    assert relative_error(own, {"q_proj": -2 * (down + turned) / 2}) < 1e-5


def test_methods_of_whole_weights_give_other_numbers(tmp_path: Path) -> None:
    text = "merge_method: karcher\nmodels:\n  - model: org/B+./x\n  - model: org/B+./y\n"
    assert any("other numbers" in note for note in from_config(text, tmp_path).notes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slices: []\nmerge_method: ties\n", "config.yaml:1: slices: has no meaning here: layers are not rearranged"),
        (f"{MODELS}merge_method: passthrough\n", "config.yaml:6: merge_method: is 'passthrough', which has no meaning"),
        (f"{MODELS}merge_method: tis\n", "config.yaml:6: merge_method: is 'tis'; allowed: "),
        (f"{MODELS}merge_method: slerp\nbase_model: org/B\n", "config.yaml:7: base_model: is none of the models"),
        (f"{MODELS}merge_method: slerp\n", "parameters.t: is missing; slerp needs it"),
        (f"{MODELS}merge_method: nearswap\n", "parameters.t: is missing; nearswap needs it, in units of the weights"),
        (
            f"{MODELS}merge_method: nearswap\nbase_model: org/B\nparameters: {{t: 1}}\n",
            "config.yaml:7: base_model: is none of the models",
        ),
        (
            f"{MODELS}  - model: org/B\nmerge_method: nearswap\nparameters: {{t: 1}}\n",
            "config.yaml:6: models[2].model: is org/B without an adapter",
        ),
        (
            "merge_method: nearswap\nmodels:\n  - {model: B+x}\n  - {model: B+y}\nparameters: {t: 0}\n",
            "config.yaml:5: parameters.t: merge method 'nearswap'",
        ),
        (f"{MODELS}merge_method: ties\nbase_model: org/B+./code\n", "config.yaml:7: base_model: has an adapter"),
        (
            f"{MODELS}  - model: org/C+x\nmerge_method: ties\n",
            "config.yaml:6: models[2].model: is on org/C, others on org/B",
        ),
        (
            f"{MODELS}  - model: org/B\nmerge_method: karcher\n",
            "config.yaml:6: models[2].model: is org/B without an adapter",
        ),
        (f"{MODELS}  - model: 3\nmerge_method: ties\n", "config.yaml:6: models[2].model: is 3; expected `base+lora`"),
        (f"{MODELS}merge_method: sce\n", "config.yaml:3: models[0].parameters.weight: is not a key"),
        (f"{MODELS}merge_method: ties\nparameters: {{dense: 1}}\n", "config.yaml:7: parameters.dense: is not a key"),
        (
            f"{MODELS}merge_method: ties\nparameters: {{density: 2}}\n",
            "config.yaml:7: parameters.density: merge method",
        ),
        (f"{MODELS}merge_method: ties\ntokens: {{}}\n", "config.yaml:7: tokens: is not a key of this format"),
        (f"{MODELS}merge_method: linear\nparameters: {{normalize: false}}\n", "scales the base model itself"),
        (f"{MODELS}merge_method: della_linear\nparameters: {{normalize: true}}\n", "weights that differ by module"),
        ("merge_method: ties\n", "config.yaml:1: models: is empty; expected a list of items"),
        (
            "merge_method: linear\nmodels:\n  - {model: B+x}\n  - {model: B+y, parameters: {weight: -1.0}}\n",
            "config.yaml:2: models: have weights that add up to 0",
        ),
        (
            "merge_method: ties\nmodels:\n  - {model: B+x, parameters: {density: 7}}\n",
            "config.yaml:3: models[0].parameters.density: merge method",
        ),
    ],
)
def test_what_is_wrong_or_has_no_meaning(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        from_config(text, tmp_path)
    assert message in str(caught.value)
