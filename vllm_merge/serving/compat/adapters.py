# SPDX-License-Identifier: Apache-2.0
"""A worker's adapters as vLLM keeps them: where it stands, what is registered, and artifacts as LoRAModels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from vllm_merge.adapters.tensor_names import TensorName
from vllm_merge.serving.compat.modules import inside_name, keeps_tokens, weights_mapper
from vllm_merge.serving.worker.experts import whole_experts


def place(vllm_config: Any) -> dict[str, int]:
    """Where a worker stands: its engine (data parallel), its rank there, and how many ranks (workers) that engine has."""
    parallel = vllm_config.parallel_config
    return {
        "engine": int(parallel.data_parallel_index),
        "rank": int(parallel.rank),
        "workers": int(parallel.world_size),
    }


def device(worker_manager: Any) -> torch.device:
    return torch.device(worker_manager.device)


def slot_dtype(worker_manager: Any) -> torch.dtype:
    dtype: torch.dtype = worker_manager.lora_config.lora_dtype
    return dtype


def max_rank(worker_manager: Any) -> int:
    return int(worker_manager.lora_config.max_lora_rank)


def _peft_names(worker_manager: Any, factors: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """{module: (A, B)} as {PEFT tensor name: tensor}, A before B."""
    layers = worker_manager._adapter_manager.modules
    names: dict[str, Tensor] = {}
    for module, (a, b) in factors.items():
        embedding = keeps_tokens(layers.get(inside_name(worker_manager, module)))
        names[str(TensorName(module, "A", embedding))] = a
        names[str(TensorName(module, "B", embedding))] = b
    return names


def lora_model(worker_manager: Any, lora_id: int, factors: Mapping[str, tuple[Tensor, Tensor]]) -> Any:
    """A LoRAModel over exactly these tensors (nothing is copied when they are on the worker's device in its dtype)."""
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    manager = worker_manager._adapter_manager
    rank = max(a.shape[0] for a, _ in factors.values())
    device = next(iter(factors.values()))[0].device
    return LoRAModel.from_lora_tensors(
        lora_model_id=lora_id,
        tensors=_peft_names(worker_manager, factors),
        peft_helper=PEFTHelper(r=rank, lora_alpha=rank, target_modules=[]),  # alpha = r: scaling 1 everywhere
        device=str(device),
        dtype=slot_dtype(worker_manager),
        model_vocab_size=worker_manager.vocab_size,
        weights_mapper=weights_mapper(manager),
        skip_prefixes=getattr(manager.model, "lora_skip_prefixes", None),
    )


def packed_lora_model(worker_manager: Any, lora_id: int, factors: Mapping[str, tuple[Tensor, Tensor]]) -> Any:
    """A LoRAModel over these tensors as vLLM has them when it fills a slot by its own copies: slices of a layer together."""
    from vllm.lora.lora_weights import LoRALayerWeights

    manager, model = worker_manager._adapter_manager, lora_model(worker_manager, lora_id, factors)
    for place, parts in manager.packed_modules.items():
        if place.endswith(".experts"):
            pairs = {part: (w.lora_a, w.lora_b) for part in parts if (w := model.loras.get(part)) is not None}
            for part, (a, b) in whole_experts(parts, pairs).items():
                model.loras[part] = LoRALayerWeights(part, a.shape[0], a.shape[0], a, b)
    manager._create_merged_loras_inplace(model)
    return model


def registered_bytes(worker_manager: Any) -> int:
    """Bytes on the worker's device of every tensor of every adapter that vLLM has registered."""
    while True:
        try:
            models = list(worker_manager._adapter_manager.list_adapters().values())
            break
        except RuntimeError:  # vLLM's thread has changed it meanwhile
            continue
    return sum(_bytes_of(model, torch.device(worker_manager.device).type) for model in models)


def _bytes_of(model: Any, device: str) -> int:
    """Counted once: a registered adapter does not change."""
    known: int | None = getattr(model, "vllm_merge_bytes", None)
    if known is None:
        tensors = [t for weights in model.loras.values() for t in _tensors_in((weights.lora_a, weights.lora_b))]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors if t.device.type == device}
        known = model.vllm_merge_bytes = sum(storage.nbytes() for storage in storages.values())
    return known


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors_in(item)


def is_registered(worker_manager: Any, lora_id: int) -> bool:
    """Whether vLLM keeps an adapter of this id, in a slot or not."""
    return lora_id in worker_manager._adapter_manager._registered_adapters


def slot_ids(worker_manager: Any) -> list[int | None]:
    """The id in each slot."""
    return list(worker_manager._adapter_manager.lora_index_to_id)


def zero_lora_model(worker_manager: Any, lora_id: int) -> Any:
    """A LoRAModel that changes nothing. It holds at least one weight: vLLM ends the engine on an empty one."""
    model = worker_manager._adapter_manager.create_dummy_lora(lora_id, 1, worker_manager.embedding_modules)
    return model if model.loras else marker_lora_model(worker_manager, lora_id)


def marker_lora_model(worker_manager: Any, lora_id: int) -> Any:
    """A LoRAModel that only stands for an artifact: its slot is filled by us, so its one tiny weight is never used."""
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.lora_weights import LoRALayerWeights

    tiny = torch.zeros(1, 1, dtype=slot_dtype(worker_manager), device=worker_manager.device)
    return LoRAModel(lora_id, 1, {"vllm_merge": LoRALayerWeights("vllm_merge", 1, 1, tiny, tiny)})


def remove_adapters(worker_manager: Any, first_id: int) -> None:
    """Take every adapter with an id from `first_id` on out of its slot and forget it; vLLM loads it anew for its next step."""
    manager = worker_manager._adapter_manager
    for lora_id in manager.list_adapters():
        if lora_id >= first_id:
            manager.remove_adapter(lora_id)
