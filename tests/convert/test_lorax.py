# SPDX-License-Identifier: Apache-2.0
"""LoRAX requests: the recipe gives the golden numbers of LoRAX, and says what it leaves out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests import golden
from tests.test_golden import relative_error
from vllm_merge import merge
from vllm_merge.convert import Converted, convert
from vllm_merge.methods.registry import default_registry
from vllm_merge.recipe.problems import RecipeError
from vllm_merge.recipe_files import check_precondition

CASES = [entry for entry in golden.entries() if entry["method"].startswith("lorax")]


def from_request(request: dict[str, Any], folder: Path) -> Converted:
    file = folder / "request.json"
    file.write_text(json.dumps(request, indent=2), encoding="utf-8")
    return convert(file, default_registry(), check_precondition)


@pytest.mark.parametrize("entry", CASES, ids=lambda entry: entry["file"].removesuffix(".safetensors"))
def test_the_numbers_of_lorax(entry: golden.Entry, tmp_path: Path) -> None:
    adapters, expected = golden.load_case(entry)
    ids = [f"org/{adapter.name}" for adapter in adapters]
    merged = {"ids": ids, "weights": entry["weights"], **entry["params"]}
    recipe = from_request({"inputs": "?", "parameters": {"merged_adapters": merged}}, tmp_path).document["recipes"][
        "merged"
    ]
    own = merge(
        adapters,
        merge_method=recipe["merge_method"],
        parameters=recipe["parameters"],
        weights=[item["parameters"]["weight"] for item in recipe["adapters"]],
    )
    assert relative_error(own, expected) <= entry["tolerance"]


def test_adapters_and_what_is_left_out(tmp_path: Path) -> None:
    request = {
        "inputs": "?",
        "parameters": {
            "max_new_tokens": 4,
            "api_token": "secret",
            "merged_adapters": {"ids": ["org/sql", "other/sql", "org/sql"], "weights": [1, 2, 3]},
        },
    }
    converted = from_request(request, tmp_path)
    assert converted.document["adapters"] == {
        "sql": {"path": "org/sql", "revision": "main"},
        "sql-2": {"path": "other/sql", "revision": "main"},
    }
    recipe = converted.document["recipes"]["merged"]
    assert [item["adapter"] for item in recipe["adapters"]] == ["sql", "sql-2", "sql"]
    assert recipe["merge_method"] == "factor_linear"
    notes = " ".join(converted.notes)
    assert "secret" not in converted.to_yaml()
    for part in ("api_token is left out", "inputs, max_new_tokens", "a commit, which never changes", "LoRAX's bugs"):
        assert part in notes


def test_weights_are_1_and_local_ids_are_folders(tmp_path: Path) -> None:
    converted = from_request({"adapter_source": "local", "merged_adapters": {"ids": ["a/x", "/data/y"]}}, tmp_path)
    assert converted.document["adapters"] == {"x": {"path": "./a/x"}, "y": {"path": "/data/y"}}
    weights = [item["parameters"] for item in converted.document["recipes"]["merged"]["adapters"]]
    assert weights == [{"weight": 1.0}, {"weight": 1.0}]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"merge_strategy": "ties"}, "merged_adapters.density: is empty; allowed is a number > 0, ≤ 1"),
        ({"merge_strategy": "ties", "density": 0}, "merged_adapters.density: is 0; allowed"),
        ({"merge_strategy": "slerp"}, "merged_adapters.merge_strategy: is 'slerp'; allowed: linear, ties"),
        ({"ids": "org/x"}, "merged_adapters.ids: is 'org/x'; expected a list"),
        ({"weights": [1]}, "merged_adapters.weights: has 1 numbers for 2 adapters"),
        ({"weight": [1, 1]}, "merged_adapters.weight: is not a key of this format, did you mean 'weights'?"),
    ],
)
def test_what_is_wrong(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"request.json:\d+: ") as caught:
        from_request({"merged_adapters": {"ids": ["org/x", "org/y"], **change}}, tmp_path)
    assert message in str(caught.value)


def test_a_source_that_cannot_be_read(tmp_path: Path) -> None:
    request = {"parameters": {"adapter_source": "s3", "merged_adapters": {"ids": ["bucket/x"]}}}
    with pytest.raises(RecipeError, match=r"parameters\.adapter_source: is 's3'; fetch the adapters to a folder"):
        from_request(request, tmp_path)
