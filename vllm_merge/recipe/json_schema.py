# SPDX-License-Identifier: Apache-2.0
"""The JSON Schema of a recipe file, for editors: the file's shape, and each method's spaces and parameters."""

from collections.abc import Sequence
from typing import Any

from vllm_merge.recipe.protocols import MethodSpec, Registry
from vllm_merge.recipe.resolve import varies
from vllm_merge.recipe.schema import RecipeDocument
from vllm_merge.recipe.values import NAME, PARAMETER_SCHEMA

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def recipe_schema(registry: Registry, preconditions: Sequence[str] = ()) -> dict[str, Any]:
    """JSON Schema (2020-12) of a recipe file with the methods of `registry`, and preconditions of these names."""
    schema = RecipeDocument.model_json_schema()
    for section in ("adapters", "recipes", "aliases", "experiments"):
        schema["properties"][section]["propertyNames"] = {"pattern": f"^{NAME.pattern}$"}
    recipe = schema["$defs"]["Recipe"]
    specs = [registry.get(name) for name in registry.names()]
    recipe["properties"]["merge_method"]["enum"] = [spec.name for spec in specs]
    name, with_parameters = recipe["properties"]["precondition"]["items"]["anyOf"]
    name["enum"] = list(preconditions)
    with_parameters["propertyNames"] = {"enum": list(preconditions)}
    recipe["allOf"] = [_method(spec) for spec in specs]
    return {"$schema": DIALECT, "title": "vllm-merge recipe file", **_without_titles(schema)}


def _method(spec: MethodSpec) -> dict[str, Any]:
    """What a recipe with this method may say."""
    own = [parameter for parameter in spec.parameters if parameter.per_adapter]
    item = {"properties": {"parameters": _parameters({p.name: PARAMETER_SCHEMA for p in own})}}
    everything = {p.name: PARAMETER_SCHEMA if varies(p) else p.json_schema for p in spec.parameters}
    return {
        "if": {"properties": {"merge_method": {"const": spec.name}}, "required": ["merge_method"]},
        "then": {
            "properties": {
                "space": {"enum": [*spec.spaces, None], "default": spec.default_space},
                "parameters": _parameters(everything),
                "adapters": {"items": item},
            }
        },
    }


def _parameters(properties: dict[str, Any]) -> dict[str, Any]:
    return {"properties": properties, "additionalProperties": False}


def _without_titles(node: Any) -> Any:
    """Pydantic titles everything after its name, which tells an editor nothing."""
    if isinstance(node, dict):
        return {key: _without_titles(value) for key, value in node.items() if key != "title" or isinstance(value, dict)}
    return [_without_titles(item) for item in node] if isinstance(node, list) else node
