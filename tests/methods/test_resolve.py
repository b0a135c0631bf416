# SPDX-License-Identifier: Apache-2.0
"""Tables of parameters: which candidate counts at which adapter and module."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from vllm_merge.methods.registry import default_registry
from vllm_merge.methods.resolve import ResolvedParameters, resolve_parameters

MODULES = ["layers.0.q_proj", "layers.0.up_proj", "layers.1.q_proj"]
CPU = torch.device("cpu")


def resolved(**given: object) -> ResolvedParameters:
    spec = default_registry().get("ties")
    arguments = {"weights": None, "parameters": None, "adapter_parameters": None, **given}
    return resolve_parameters(spec, "knots", ["x", "y"], **arguments)  # type: ignore[arg-type]


def test_scalars_are_the_same_at_every_module() -> None:
    tables = resolved(weights=[0.5, 2], parameters={"density": 0.3}).tensors(MODULES, CPU)
    assert set(tables) == {"weight", "density"}
    assert {table.dtype for table in tables.values()} == {torch.float64}
    assert tables["weight"].tolist() == [[0.5, 2.0]] * 3
    assert tables["density"].tolist() == [[0.3, 0.3]] * 3


def test_a_mapping_counts_where_it_names_the_module_and_the_next_candidate_elsewhere() -> None:
    """Adapter, then recipe, then default, module by module; a scalar beside a mapping stays what it is."""
    tables = resolved(
        weights=[{"layers.0.q_proj": 5.0}, 2.0],
        parameters={"weight": {"layers.0.q_proj": 7.0, "layers.1.q_proj": 3.0}, "density": {"layers.0.up_proj": 0.9}},
        adapter_parameters=[{}, {"density": {"layers.0.q_proj": 0.4}}],
    ).tensors(MODULES, CPU)
    assert tables["weight"].tolist() == [[5.0, 2.0], [1.0, 2.0], [3.0, 2.0]]
    assert tables["density"].tolist() == [[0.2, 0.4], [0.9, 0.9], [0.2, 0.2]]


def test_modules_are_looked_up_by_name_not_by_place() -> None:
    given = resolved(weights=[{"layers.0.q_proj": 5.0}, 2.0])
    one = given.tensors(MODULES, CPU)["weight"]
    other = given.tensors(MODULES[::-1], CPU)["weight"]
    assert torch.equal(one.flip(0), other)
    assert given.tensors([], CPU)["weight"].numel() == 0


@pytest.mark.parametrize(
    ("given", "weight", "density", "lam"),
    [
        ({}, (1.0, 1.0), (0.2, 0.2), 1.0),
        ({"weights": [2, 3.0], "parameters": {"lambda": 0.5}}, (2.0, 3.0), (0.2, 0.2), 0.5),
        ({"adapter_parameters": [{}, {"density": 0.4}]}, (1.0, 1.0), (0.2, 0.4), 1.0),
    ],
)
def test_parameters_that_are_alike_at_all_modules_can_be_looked_up(
    given: dict[str, Any], weight: tuple[float, ...], density: tuple[float, ...], lam: float
) -> None:
    found = resolved(**given).scalars
    assert found is not None
    own, recipe, scale = found
    assert (dict(own), scale) == ({"weight": weight, "density": density}, lam)
    assert hash(found) == hash(resolved(**given).scalars)
    assert dict(recipe) == resolved(**given).per_recipe


@pytest.mark.parametrize(
    "given",
    [
        {"weights": [{"layers.0.q_proj": 5.0}, 2.0]},
        {"parameters": {"density": {"layers.0.q_proj": 0.5}}},
        {"parameters": {"lambda": {"layers.0.q_proj": 0.5}}},
    ],
)
def test_those_that_differ_by_module_cannot(given: dict[str, Any]) -> None:
    assert resolved(**given).scalars is None


def test_nor_can_lists() -> None:
    found = replace(resolved(), per_recipe={"stages": [1, 2]})
    assert found.scalars is None


@pytest.mark.parametrize(
    ("given", "expected", "unscaled"),
    [
        (None, [1.0, 1.0, 1.0], True),
        (1, [1.0, 1.0, 1.0], True),
        (0.5, [0.5, 0.5, 0.5], False),
        ({"layers.1.q_proj": 0.5}, [1.0, 1.0, 0.5], False),
        ({"layers.1.q_proj": 1.0}, [1.0, 1.0, 1.0], False),
    ],
)
def test_lambda(given: object, expected: list[float], unscaled: bool) -> None:
    found = resolved(parameters={} if given is None else {"lambda": given})
    assert found.lambdas(MODULES, CPU).tolist() == expected
    assert found.unscaled == unscaled
