# SPDX-License-Identifier: Apache-2.0
"""Weights as a recipe writes them are, read again, the weights that were learned, module by module."""

from __future__ import annotations

import random

import pytest
import torch

from vllm_merge.methods.registry import default_registry
from vllm_merge.recipe.resolve import adapter_parameters, evaluate, relative_depths
from vllm_merge.tuning.weights import Groups, rounded, written

MODULES = [
    *(f"model.layers.{layer}.{name}" for layer in (0, 1, 2, 11) for name in ("self_attn.q_proj", "mlp.up_proj")),
    "model.embed_tokens",
    "lm_head",
]


def read_again(value: object) -> list[float]:
    spec = default_registry().get("task_arithmetic")
    planned = adapter_parameters(spec, {"weight": value}, {})["weight"]
    found = evaluate(planned, MODULES, relative_depths(MODULES))
    return [found[module] if isinstance(found, dict) else found for module in MODULES]


@pytest.mark.parametrize("per", ["adapter", "layer", "part", "module"])
def test_what_is_written_is_read_again(per: str) -> None:
    groups = Groups.of(MODULES, per)
    rng = random.Random(per)
    grouped = torch.tensor([[rng.uniform(0, 2)] for _ in groups.names], dtype=torch.float64)
    table = rounded(groups.spread(grouped))
    assert read_again(written(MODULES, table[:, 0].tolist())) == table[:, 0].tolist()
    assert torch.allclose(groups.mean(groups.spread(grouped)), grouped)


def test_a_part_is_the_attention_or_the_mlp_of_a_layer() -> None:
    layer = [f"model.layers.0.{name}" for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj")]
    groups = Groups.of([*layer, "lm_head"], "part")
    assert groups.names == ("model.layers.0.self_attn", "model.layers.0.mlp", "lm_head")
    assert groups.index.tolist() == [0, 0, 1, 2]


def test_the_simplest_form_is_written() -> None:
    assert written(MODULES, [0.5] * len(MODULES)) == 0.5
    by_layer = written(MODULES, [float(i // 2) for i in range(len(MODULES) - 1)] + [9.0])
    assert {"filter": "model.layers.1.", "value": 1.0} in by_layer
    assert len(by_layer) == 6
    assert len(written(MODULES, [float(i) for i in range(len(MODULES))])) == len(MODULES)


def test_a_name_within_another_does_not_take_its_weight() -> None:
    """`head` is within `lm_head`, and the first filter that fits wins."""
    modules = ["head", "lm_head", "the.lm_head.out"]
    spec = default_registry().get("task_arithmetic")
    value = written(modules, [1.0, 2.0, 3.0])
    found = evaluate(adapter_parameters(spec, {"weight": value}, {})["weight"], modules, relative_depths(modules))
    assert found == {"head": 1.0, "lm_head": 2.0, "the.lm_head.out": 3.0}


def test_groups() -> None:
    assert Groups.of(MODULES, "adapter").names == ("all",)
    assert Groups.of(MODULES, "layer").names == (
        "model.layers.0.",
        "model.layers.1.",
        "model.layers.2.",
        "model.layers.11.",
        "model.embed_tokens",
        "lm_head",
    )
    assert Groups.of(MODULES, "module").names == tuple(MODULES)
