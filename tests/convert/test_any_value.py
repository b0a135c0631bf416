# SPDX-License-Identifier: Apache-2.0
"""Whatever stands anywhere in a file that is converted, the answer is a recipe or a message, never another failure."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from vllm_merge.convert import FORMATS, convert
from vllm_merge.errors import UserInputError
from vllm_merge.methods.registry import default_registry
from vllm_merge.recipe_files import check_precondition

GOOD: dict[str, dict[str, Any]] = {
    "mergekit": {
        "merge_method": "linear",
        "base_model": "org/B",
        "models": [
            {"model": "org/B+./x", "parameters": {"weight": 1}},
            {"model": {"model": {"path": "org/B"}, "lora": {"path": "y", "revision": "z"}}},
            {"model": "org/B", "parameters": {"weight": [{"filter": "mlp", "value": 1}, {"value": 0}]}},
        ],
        "parameters": {"normalize": True},
    },
    "peft": {
        "adapters": ["x", "y"],
        "weights": [1, 1],
        "combination_type": "dare_ties_svd",
        "density": 0.5,
        "svd_rank": 4,
    },
    "lorax": {"parameters": {"merged_adapters": {"ids": ["org/x"], "weights": [1], "merge_strategy": "dare_ties"}}},
}
VALUES: list[Any] = [None, -1, float("nan"), 10**400, "", "a+b+c", "@", [], {}, [None], {"value": 1}, {1: 2}]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where anything stands."""
    yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*path, key))


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """The value with another at one place."""
    if not path:
        return new
    result = copy.deepcopy(value)
    at = result
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = new
    return result


@pytest.mark.parametrize("source", FORMATS)
def test_any_value_anywhere(source: str, tmp_path: Path) -> None:
    file = tmp_path / "file.yaml"
    refused = []
    for path in places(GOOD[source]):
        for new in VALUES:
            file.write_text(yaml.safe_dump(changed(GOOD[source], path, new)), encoding="utf-8")
            try:
                convert(file, default_registry(), check_precondition, source=source)
            except UserInputError as error:
                refused.append(str(error))
    assert len(refused) > 50
    assert all(message.startswith(str(file)) for message in refused)
