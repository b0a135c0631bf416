# SPDX-License-Identifier: Apache-2.0
"""Merge LoRA adapters by recipe and serve the result from vLLM."""

from vllm_merge.adapters.factors import Adapter, LoraFactors
from vllm_merge.artifact import MergedAdapter, MergeReport
from vllm_merge.engine import merge
from vllm_merge.errors import MergeCancelled, MergeError, UserInputError
from vllm_merge.methods.registry import list_methods

__all__ = [
    "Adapter",
    "LoraFactors",
    "MergeCancelled",
    "MergeError",
    "MergeReport",
    "MergedAdapter",
    "UserInputError",
    "list_methods",
    "merge",
]
