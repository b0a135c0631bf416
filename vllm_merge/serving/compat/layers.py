# SPDX-License-Identifier: Apache-2.0
"""The layers that hold slots: their buffers, and what of an artifact goes into each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from vllm_merge.serving.compat.modules import inside_name, keeps_tokens
from vllm_merge.serving.memory.slots import SlotBuffer


def slot_buffers(worker_manager: Any) -> list[SlotBuffer] | None:
    """Every buffer of a slot, in a fixed order; None for a model with layers whose slots we do not know how to clear."""
    from vllm.lora.layers import (
        LogitsProcessorWithLoRA,
        MergedColumnParallelLinearWithLoRA,
        RowParallelLinearWithLoRA,
        VocabParallelEmbeddingWithLoRA,
    )

    clear = {
        RowParallelLinearWithLoRA.reset_lora,  # that of every linear layer
        LogitsProcessorWithLoRA.reset_lora,
        VocabParallelEmbeddingWithLoRA.reset_lora,
    }
    fill = {
        RowParallelLinearWithLoRA.set_lora,  # that of every linear layer of one slice
        MergedColumnParallelLinearWithLoRA.set_lora,
        LogitsProcessorWithLoRA.set_lora,
        VocabParallelEmbeddingWithLoRA.set_lora,
    }
    manager = worker_manager._adapter_manager
    buffers = []
    for name, layer in manager.modules.items():
        if type(layer).reset_lora not in clear or hasattr(type(layer), "reset_module_to_save"):
            return None
        stacks = (layer.lora_a_stacked, layer.lora_b_stacked)
        slices = [(stack,) if isinstance(stack, Tensor) else tuple(stack) for stack in stacks]
        parts = manager.packed_modules.get(name, [name])
        known = type(layer).set_lora in fill and len(parts) == len(slices[0])
        for letter, stacked in zip("AB", slices, strict=True):
            for index, tensor in enumerate(stacked):
                if not tensor.is_contiguous():
                    return None
                buffers.append(SlotBuffer(name, parts[index] if known else None, letter, tensor))
    return buffers


def slot_views(
    worker_manager: Any, buffers: Sequence[SlotBuffer], factors: Mapping[str, tuple[Tensor, Tensor]]
) -> list[Tensor | None] | None:
    """What of these factors goes into each buffer on this tensor-parallel rank; None if a factor has no buffer."""
    inside = {inside_name(worker_manager, module): pair for module, pair in factors.items()}
    manager = worker_manager._adapter_manager
    places = {module: place for place in manager.modules for module in manager.packed_modules.get(place, [place])}
    here = {module for module in inside if module in places}
    if not here <= {buffer.module for buffer in buffers}:
        return None
    views: dict[tuple[str, str], list[Tensor | None]] = {}
    for name in {places[module] for module in here}:
        parts = manager.packed_modules.get(name, [name])
        pairs = [inside.get(part, (None, None)) for part in parts]
        layer = manager.modules[name]
        views[name, "A"], views[name, "B"] = sliced(layer, [a for a, _ in pairs], [b for _, b in pairs])
        if keeps_tokens(layer):  # a row for each token: the layer's A is the transpose
            views[name, "A"] = [None if a is None else a.mT.contiguous() for a in views[name, "A"]]
    taken = {key: iter(value) for key, value in views.items()}
    return [next(taken[b.layer, b.letter]) if (b.layer, b.letter) in taken else None for b in buffers]


def sliced(
    layer: Any, a: list[Tensor | None], b: list[Tensor | None]
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """A layer's own tensor-parallel slicing, for any number of slices."""
    if getattr(layer, "tp_size", 1) == 1 or isinstance(layer.lora_a_stacked, Tensor):
        return a, b
    if len(a) > 1:
        return layer.slice_lora_a(a), layer.slice_lora_b(b)
    return [layer.slice_lora_a(a[0])], [layer.slice_lora_b(b[0])]
