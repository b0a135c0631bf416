# SPDX-License-Identifier: Apache-2.0
"""Precedence, filters and gradients."""

from typing import Any

import pytest

from vllm_merge.recipe.protocols import Registry
from vllm_merge.recipe.resolve import adapter_parameters, evaluate, layered, recipe_parameters, relative_depths

MODULES = [f"model.layers.{layer}.{part}" for layer in range(5) for part in ("self_attn.q_proj", "mlp.up_proj")]


def at(value: Any, modules: list[str] = MODULES) -> Any:
    return evaluate(value, modules, relative_depths(modules))


def mlp(value: Any) -> dict[str, Any]:
    return {"filter": "mlp", "value": value}


def rest(value: Any) -> dict[str, Any]:
    return {"filter": None, "value": value}


def test_depths() -> None:
    depths = relative_depths(["m.layers.0.x", "m.layers.1.x", "m.layers.4.x", "vision.blocks.1.experts.7.y", "lm_head"])
    assert depths == {
        "m.layers.0.x": 0.0,
        "m.layers.1.x": 0.25,
        "m.layers.4.x": 1.0,
        "vision.blocks.1.experts.7.y": 1.0,  # its own stack, whose last block is 1
        "lm_head": 1.0,
    }


@pytest.mark.parametrize(
    ("name", "depth"),
    [
        ("model.embed_tokens", 0.0),
        ("transformer.wte", 0.0),
        ("embeddings.word_embeddings", 0.0),
        ("lm_head", 1.0),
        ("model.embedder_gate.norm", 1.0),
        ("newte", 1.0),
    ],
)
def test_an_embedding_comes_before_the_layers(name: str, depth: float) -> None:
    assert relative_depths([name, "model.layers.0.q", "model.layers.9.q"])[name] == depth


def test_one_layer_is_the_first() -> None:
    assert relative_depths(["layers.0.q"]) == {"layers.0.q": 0.0}


@pytest.mark.parametrize(
    ("gradient", "expected"),
    [
        ([0, 1], [0, 0.25, 0.5, 0.75, 1]),
        ([1, 0.5, 0], [1, 0.75, 0.5, 0.25, 0]),
        ([0, 3, 0, 4], [0, 2.25, 1.5, 1, 4]),
    ],
)
def test_gradient_is_linear_over_layers(gradient: list[float], expected: list[float]) -> None:
    found = at(gradient)
    assert [found[f"model.layers.{layer}.mlp.up_proj"] for layer in range(5)] == pytest.approx(expected)
    assert [found[f"model.layers.{layer}.self_attn.q_proj"] for layer in range(5)] == pytest.approx(expected)


def test_scalar_stays_a_scalar() -> None:
    assert at(0.5) == 0.5
    assert at(True) is True


def test_first_filter_that_matches_wins() -> None:
    found = at([mlp([0, 1]), {"filter": "layers.2", "value": 9}, rest(7)])
    assert found["model.layers.2.mlp.up_proj"] == 0.5
    assert found["model.layers.2.self_attn.q_proj"] == 9
    assert found["model.layers.3.self_attn.q_proj"] == 7


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, 2], 1),
        ([[mlp(1)], 2], [mlp(1), rest(2)]),
        ([[mlp(1)], [mlp(5), {"filter": "attn", "value": 3}], 2], [mlp(1), {"filter": "attn", "value": 3}, rest(2)]),
        ([[mlp(1), rest(4)], 2], [mlp(1), rest(4)]),
        ([[{"filter": "*", "value": 4}], 2], 4),
        ([[mlp(2)], 2], 2),
        ([[3]], 3),
        ([[3, 3, 3]], 3),
        ([[1, 2], 5], [1, 2]),
    ],
)
def test_layers_collapse_to_the_simplest(values: list[Any], expected: Any) -> None:
    assert layered(values) == expected


def test_precedence(registry: Registry) -> None:
    ties = registry.get("ties")
    own, recipe = {"weight": [mlp(0.5)]}, {"weight": 2, "density": [1, 0], "lambda": 0.3}
    assert adapter_parameters(ties, own, recipe) == {"weight": [mlp(0.5), rest(2)], "density": [1, 0]}
    assert adapter_parameters(ties, {}, {}) == {"weight": 1.0, "density": 0.2}
    assert recipe_parameters(ties, recipe) == {"normalize": True, "lambda": 0.3}
    assert recipe_parameters(ties, {}) == {"normalize": True, "lambda": 1.0}
