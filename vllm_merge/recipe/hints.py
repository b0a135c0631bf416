# SPDX-License-Identifier: Apache-2.0
"""Pydantic's findings in the words of a recipe file, with hints for what people bring along from mergekit."""

from collections.abc import Mapping
from typing import Any

from pydantic_core import ErrorDetails

from vllm_merge.recipe.experiments import Experiment, Guardrail, Namespace, Primary
from vllm_merge.recipe.problems import KeyPath, suggested
from vllm_merge.recipe.safety import Safety
from vllm_merge.recipe.schema import AdapterEntry, Recipe, RecipeDocument, RecipeInput
from vllm_merge.recipe.values import shown

_TOP = tuple(RecipeDocument.model_fields)
_MERGEKIT_MODELS = "mergekit's `models:` is `adapters:` here, with items {adapter: NAME, parameters: {…}}"
_RECIPE_KEY = "it belongs to a recipe: put it under `recipes:`, then the recipe's name"

# (where, key) -> hint; `where` is "file", "recipe", "input" or "adapter".
_HINTS = {
    ("file", "models"): f"{_MERGEKIT_MODELS}, inside a recipe",
    ("file", "merge_method"): _RECIPE_KEY,
    ("file", "parameters"): _RECIPE_KEY,
    ("file", "slices"): "slices of layers are not merged; a parameter may be a list, a gradient over the layers",
    ("file", "arms"): "an experiment stands under `experiments:`, then its name",
    ("experiment", "variants"): "the key is `arms`: {NAME: WEIGHT, …}",
    ("experiment", "weights"): "each arm has its weight: `arms: {NAME: WEIGHT, …}`",
    ("file", "dtype"): "the server's dtype is used; offline, give `vllm-merge merge --dtype`",
    ("recipe", "models"): _MERGEKIT_MODELS,
    ("recipe", "base_model"): "the base model is the same for all recipes: put it at the top of the file",
    ("recipe", "slices"): "slices of layers are not merged; a parameter may be a list, a gradient over the layers",
    ("recipe", "dtype"): "the server's dtype is used; offline, give `vllm-merge merge --dtype`",
    ("recipe", "out_dtype"): "the server's dtype is used; offline, give `vllm-merge merge --dtype`",
    ("recipe", "weights"): "give each adapter its `parameters: {weight: …}`",
    ("recipe", "lambda"): "method parameters stand under `parameters:`",
    ("recipe", "density"): "method parameters stand under `parameters:`",
    ("input", "model"): "the key is `adapter`, and its value the name of a registered adapter or recipe",
    ("input", "weight"): "put it under `parameters:`",
    ("input", "density"): "put it under `parameters:`",
    ("adapter", "model"): "the key is `path`",
}
_TYPES = {
    "string_type": "text",
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
}


def message(error: ErrorDetails) -> tuple[KeyPath, str]:
    """Where the file is wrong, and the message."""
    path: KeyPath = error["loc"]
    kind, found, context = error["type"], error["input"], error.get("ctx", {})
    if kind == "recipe":
        return path, str(error["msg"])
    if kind == "extra_forbidden":
        return path, _unknown_key(path)
    if kind == "missing":
        return path, _missing_key(path)
    if kind in _TYPES:
        return path, f"is {shown(found)}; expected {_TYPES[kind]}{_quote_hint(kind, found)}"
    return path, f"is {shown(found)}; {_allowed(kind, context, error['msg'])}"


def _allowed(kind: str, context: Mapping[str, Any], fallback: str) -> str:
    match kind:
        case "literal_error":
            return f"allowed is {context['expected']}"
        case "greater_than":
            return f"allowed is more than {context['gt']}"
        case "less_than":
            return f"allowed is less than {context['lt']}"
        case "greater_than_equal":
            return f"allowed is at least {context['ge']}"
        case "less_than_equal":
            return f"allowed is at most {context['le']}"
        case "string_too_short":
            return "expected a name"
        case "too_short":
            return f"expected at least {context['min_length']} item"
    return fallback


def _quote_hint(kind: str, found: object) -> str:
    return "; quote it" if kind == "string_type" and isinstance(found, bool | int | float) else ""


def _place(path: KeyPath) -> tuple[str, tuple[str, ...]]:
    match path[:-1]:
        case ("recipes", _):
            return "recipe", tuple(field.alias or name for name, field in Recipe.model_fields.items())
        case ("recipes", _, "adapters", _):
            return "input", tuple(RecipeInput.model_fields)
        case ("recipes", _, "safety"):
            return "safety", tuple(Safety.model_fields)
        case ("adapters", _):
            return "adapter", tuple(AdapterEntry.model_fields)
        case ("experiments", _):
            return "experiment", tuple(Experiment.model_fields)
        case ("experiments", _, "guardrails", _):
            return "guardrail", tuple(Guardrail.model_fields)
        case ("experiments", _, "namespace"):
            return "namespace", tuple(Namespace.model_fields)
        case ("experiments", _, "primary"):
            return "primary", tuple(Primary.model_fields)
    return "file", _TOP


def _unknown_key(path: KeyPath) -> str:
    key = str(path[-1])
    place, allowed = _place(path)
    if hint := _HINTS.get((place, key)):
        return f"unknown key; {hint}"
    return f"unknown key{suggested(key, allowed, 'allowed')}"


def _missing_key(path: KeyPath) -> str:
    match path:
        case ("version",):
            return "is missing; begin the file with `version: 1`"
        case (*_, "merge_method"):
            return "is missing; `vllm-merge methods` lists the merge methods"
        case ("experiments", _, "arms"):
            return "is missing; give each arm's weight: `arms: {NAME: WEIGHT, …}`"
        case ("adapters", _, "path"):
            return "is missing; give the adapter's folder or Hub repository"
        case _:
            return "is missing"
