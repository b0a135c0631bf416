# SPDX-License-Identifier: Apache-2.0
"""What a learner begins with is what a plan merges."""

from __future__ import annotations

import torch
import yaml

from tests.tuning.conftest import WriteRecipe
from vllm_merge import load_recipes
from vllm_merge.adapters.peft import hash_adapter
from vllm_merge.methods.registry import default_registry
from vllm_merge.plan_runner import run_plan
from vllm_merge.recipe.plan import make_plan
from vllm_merge.tuning.start import Start


def test_masks_over_a_recipe_among_the_inputs_are_those_of_the_plan(recipe: WriteRecipe) -> None:
    file = recipe("task_arithmetic", ("reverse", "upper"))
    document = yaml.safe_load(file.read_text())
    document["recipes"]["outer"] = {
        "merge_method": "dare_linear",
        "space": "core",
        "adapters": [{"adapter": "r"}, {"adapter": "upper"}],
        "parameters": {"density": 0.5},
        "seed": 3,
    }
    file.write_text(yaml.safe_dump(document, sort_keys=False))
    found = load_recipes(file)
    plan = make_plan(
        found,
        "outer",
        registry=default_registry(),
        adapter_hashes={name: hash_adapter(entry.path) for name, entry in found.adapters.items()},
        base_model_hash="",
        max_rank=None,
        dtype="float32",
    )
    start = Start.of(plan, torch.device("cpu"))
    expected, scored = run_plan(plan).factors, start.merged(start.weights())
    assert set(scored) == set(expected)
    for module, pair in expected.items():
        wanted = pair.delta()
        assert torch.allclose(scored[module].delta(), wanted, atol=1e-5 * float(wanted.abs().max())), module
