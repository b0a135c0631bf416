# SPDX-License-Identifier: Apache-2.0
"""Parity with the official implementations, and the places where ours must differ from them."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from tests import golden, golden_peft
from vllm_merge import Adapter, LoraFactors, MergedAdapter, merge

ENTRIES = golden.entries()
EXACT = [e for e in ENTRIES if e["kind"] == "exact" and e["method"] != "osrm_init"]  # that is in tests/training
QUIRKS = [entry for entry in ENTRIES if entry["kind"] == "peer-quirk" and golden_peft.recipe_for(entry)]
BY_FILE = {entry["file"]: entry for entry in ENTRIES}


def relative_error(merged: MergedAdapter, expected: Mapping[str, Tensor]) -> float:
    """‖own − expected‖_F / ‖expected‖_F over all modules."""
    difference = torch.zeros((), dtype=torch.float64)
    size = torch.zeros((), dtype=torch.float64)
    for module, target in expected.items():
        own = merged.delta(module) if module in merged.factors else torch.zeros_like(target)
        difference += (own.double() - target.double()).square().sum()
        size += target.double().square().sum()
    return float((difference / size).sqrt())


@pytest.mark.parametrize("entry", EXACT, ids=lambda entry: entry["file"].removesuffix(".safetensors"))
def test_exact_case(entry: golden.Entry) -> None:
    recipe = golden.recipe_for(entry)
    if recipe is None:
        pytest.skip(f"method {entry['method']} is not implemented yet")
    adapters, expected = golden.load_case(entry)
    merged = merge(adapters, **recipe)
    assert set(merged.factors) <= set(expected)
    assert relative_error(merged, expected) <= entry["tolerance"]
    for module, rank in entry["result"]["numerical_rank_1e-6"].items():
        assert merged.report.ranks[module] == rank


@pytest.mark.parametrize("entry", QUIRKS, ids=lambda entry: entry["file"].removesuffix(".safetensors"))
def test_a_peers_quirk(entry: golden.Entry) -> None:
    """Within the tolerance under `compat`, and far from it without."""
    recipe = golden.recipe_for(entry)
    assert recipe is not None
    adapters, expected = golden.load_case(entry)
    assert relative_error(merge(adapters, **recipe), expected) <= entry["tolerance"]
    parameters = {name: value for name, value in recipe.get("parameters", {}).items() if name != "compat"}
    without = merge(adapters, **{**recipe, "parameters": parameters, "precondition": []})
    assert relative_error(without, expected) > 0.1


def test_a_wrong_parameter_fails_the_case() -> None:
    entry = BY_FILE["knots_ties_k20_mean__rand3.safetensors"]
    adapters, expected = golden.load_case(entry)
    recipe = golden.recipe_for(entry)
    assert recipe is not None
    recipe["parameters"] |= {"density": 0.21}
    assert relative_error(merge(adapters, **recipe), expected) > 100 * entry["tolerance"]


def test_knots_has_no_absolute_threshold() -> None:
    """The reference drops singular values under 1e-5; ours gives the same merge at every scale of the adapters."""
    entry = BY_FILE["knots_ties_k20_mean__micro3.safetensors"]
    adapters, quirk = golden.load_case(entry)
    recipe = golden.recipe_for(entry)
    assert recipe is not None
    own = merge(adapters, **recipe)
    assert relative_error(own, quirk) > 0.1
    scale = 2.0**16  # exact in float32
    larger = [
        Adapter(a.name, {m: LoraFactors(f.A, f.B * scale, f.scaling) for m, f in a.factors.items()}) for a in adapters
    ]
    rescaled = {module: factors.delta() / scale for module, factors in merge(larger, **recipe).factors.items()}
    assert relative_error(own, rescaled) < 1e-6


def test_scaling_is_applied_once() -> None:
    """PEFT's svd applies alpha / r twice."""
    entry = BY_FILE["peft_svd__mixed3.safetensors"]
    adapters, quirk = golden.load_case(entry)
    recipe = golden.recipe_for(entry)
    assert recipe is not None
    recipe["precondition"] = []
    assert relative_error(merge(adapters, **recipe), quirk) > 0.1
    squared = [
        Adapter(a.name, {m: LoraFactors(f.A, f.B, f.scaling**2) for m, f in a.factors.items()}) for a in adapters
    ]
    assert relative_error(merge(squared, **recipe), quirk) <= entry["tolerance"]


def test_an_unknown_method_has_no_recipe() -> None:
    assert golden.recipe_for({"method": "not_a_method", "params": {}, "weights": None}) is None
