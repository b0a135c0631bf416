# SPDX-License-Identifier: Apache-2.0
"""The base model's modules as vLLM names and lays them out."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def weights_mapper(manager: Any) -> Any:
    """The model's renames of checkpoint names, without the fusing of q, k and v, which vLLM does itself later."""
    mapper = getattr(manager.model, "hf_to_vllm_mapper", None)
    for method in ("get_rename_mapper", "get_unstacked_mapper"):  # 0.27 and newer, 0.26
        if mapper is not None and hasattr(mapper, method):
            return getattr(mapper, method)()
    return mapper


def inside_name(worker_manager: Any, module: str) -> str:
    """The model's own name of a module that checkpoints call `module`."""
    from vllm.lora.utils import parse_fine_tuned_lora_name

    mapper = weights_mapper(worker_manager._adapter_manager)
    name, _ = parse_fine_tuned_lora_name(f"base_model.model.{module}.lora_A.weight", mapper)
    return str(name)


def keeps_tokens(layer: Any) -> bool:
    """Whether a layer is an embedding, whose stacked A is (slots, tokens, rank)."""
    stacked = getattr(layer, "lora_a_stacked", None)
    return isinstance(stacked, Tensor) and stacked.ndim == 3
