# SPDX-License-Identifier: Apache-2.0
"""Whether an artifact fits into the slots of a model, asked before vLLM could find out inside a step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vllm_merge.serving.compat.adapters import max_rank
from vllm_merge.serving.compat.layers import sliced
from vllm_merge.serving.compat.modules import inside_name, keeps_tokens
from vllm_merge.serving.worker.experts import DOWN, projections


def misfits(worker_manager: Any, factors: Mapping[str, tuple[Tensor, Tensor]]) -> list[str]:
    """Why these factors could not be put into a slot of this model: one sentence a reason, empty if they can.

    vLLM finds out only while it fills a slot inside a step, where an exception ends the engine; so we ask first, with
    tensors that have shapes but no storage, sliced by the layers' own tensor-parallel rules.
    """
    manager = worker_manager._adapter_manager
    limit = max_rank(worker_manager)
    places = {
        part: (name, index)
        for name in manager.modules
        for index, part in enumerate(manager.packed_modules.get(name, [name]))
    }
    reasons = []
    for module, (a, b) in factors.items():
        inside = inside_name(worker_manager, module)
        if a.shape[0] > limit:
            reasons.append(
                f"{module} has rank {a.shape[0]}, but this server was started with --max-lora-rank {limit}. "
                "Restart it with a higher one, or give the recipe `rank: auto` or a rank that fits."
            )
        elif inside not in places:
            if (kind := _vocabulary_layer(manager.model, inside)) is not None:
                last = module.rpartition(".")[2]
                reasons.append(
                    f"{module} is {kind}, and vLLM applies no LoRA to it in {type(manager.model).__name__}. Leave it out "
                    f"of the merge (a weight of 0 for `filter: {last}`), or serve a base model into which it is merged."
                )
            elif not _on_another_stage(manager.model, inside):
                reasons.append(
                    f"{module} is not a module of {type(manager.model).__name__} that LoRA can be applied to here "
                    f"(supported: {', '.join(sorted(_supported_suffixes(manager)))})."
                )
        elif problem := _slot_problem(manager, places[inside], a, b):
            reasons.append(f"{module}: {problem}")
    return reasons


def _supported_suffixes(manager: Any) -> set[str]:
    suffixes: set[str] = set()
    for module in manager.supported_lora_modules:
        suffixes.update(manager.packed_modules_mapping.get(module, [module]))
    return suffixes


def _vocabulary_layer(model: torch.nn.Module, module: str) -> str | None:
    """What a module with a row for each token is called, which vLLM's model has but takes no LoRA for; else None."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    try:
        layer = model.get_submodule(module)
    except AttributeError:
        return None
    if not isinstance(layer, VocabParallelEmbedding):
        return None
    return "the model's head" if isinstance(layer, ParallelLMHead) else "an embedding"


def _on_another_stage(model: torch.nn.Module, module: str) -> bool:
    """Is this a module of a layer that another pipeline stage holds?"""
    from vllm.model_executor.models.utils import PPMissingLayer

    node: Any = model
    for part in module.split("."):
        try:
            node = node[int(part)] if part.isdigit() else getattr(node, part)
        except (AttributeError, IndexError, TypeError):
            return False
        if isinstance(node, PPMissingLayer):
            return True
    return False


def _slot_problem(manager: Any, place: tuple[str, int], a: Tensor, b: Tensor) -> str | None:
    from vllm.lora.layers import FusedMoEWithLoRA

    name, index = place
    layer = manager.modules[name]
    if isinstance(layer, FusedMoEWithLoRA):  # slices by itself, all experts together
        inner, hidden = layer.intermediate_size_per_partition * layer.tp_size, layer.hidden_size
        down = index % projections(manager.packed_modules[name]) == DOWN
        wanted = (inner, hidden) if down else (hidden, inner)
        return None if (a.shape[1], b.shape[0]) == wanted else _other_features(a, b, wanted, "")
    stacks_a, stacks_b = layer.lora_a_stacked, layer.lora_b_stacked
    if keeps_tokens(layer):
        tokens, features = stacks_a.shape[1], stacks_b.shape[-2]
        if (a.shape[1], b.shape[0]) != (tokens, features):
            return (
                f"it embeds {a.shape[1]} tokens in {b.shape[0]} features, but the base model's layer {tokens} in {features}. "
                "The adapter was trained on a model with another vocabulary or width."
            )
        return None
    if isinstance(stacks_a, Tensor):  # lm_head keeps one tensor; its B has a row per token of the vocabulary
        stacks_a, stacks_b = (stacks_a,), (stacks_b,)
        if b.shape[0] != manager.vocab_size:
            return f"B has {b.shape[0]} rows, but the base model's vocabulary has {manager.vocab_size} tokens."
        want_in, want_out = stacks_a[0].shape[-1], b.shape[0]
    else:
        want_in, want_out = stacks_a[index].shape[-1], stacks_b[index].shape[-2]
    shaped = [(torch.empty(a.shape, device="meta"), torch.empty(b.shape, device="meta"))]
    pairs = [(None, None)] * index + shaped + [(None, None)] * (len(stacks_a) - index - 1)
    sliced_a, sliced_b = sliced(layer, [pair[0] for pair in pairs], [pair[1] for pair in pairs])
    meta_a, meta_b = sliced_a[index], sliced_b[index]
    assert meta_a is not None
    assert meta_b is not None
    if (meta_a.shape[1], meta_b.shape[0]) != (want_in, want_out):
        return _other_features(a, b, (want_in, want_out), " (per tensor-parallel rank)")
    return None


def _other_features(a: Tensor, b: Tensor, wanted: tuple[int, int], of: str) -> str:
    return (
        f"it maps {a.shape[1]} to {b.shape[0]} features, but the base model's layer maps {wanted[0]} to {wanted[1]}{of}. "
        "The adapter was trained on another base model."
    )
