# SPDX-License-Identifier: Apache-2.0
"""Merge LoRA adapters by recipe and serve the result from vLLM.

Names are imported when they are first used, so that the command line starts without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_merge.adapters.factors import Adapter, LoraFactors
    from vllm_merge.artifact import MergedAdapter, MergeReport
    from vllm_merge.engine import merge
    from vllm_merge.errors import MergeCancelled, MergeError, UserInputError
    from vllm_merge.methods.registry import list_methods
    from vllm_merge.recipe_files import load_recipes

_HOMES = {
    "Adapter": "adapters.factors",
    "LoraFactors": "adapters.factors",
    "MergeCancelled": "errors",
    "MergeError": "errors",
    "MergeReport": "artifact",
    "MergedAdapter": "artifact",
    "UserInputError": "errors",
    "list_methods": "methods.registry",
    "load_recipes": "recipe_files",
    "merge": "engine",
}

__all__ = [
    "Adapter",
    "LoraFactors",
    "MergeCancelled",
    "MergeError",
    "MergeReport",
    "MergedAdapter",
    "UserInputError",
    "list_methods",
    "load_recipes",
    "merge",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
