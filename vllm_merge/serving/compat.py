# SPDX-License-Identifier: Apache-2.0
"""Every touch of vLLM that its documentation does not promise.

ground.py is the register: each name, why it is touched, how, and when the touch can go.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vllm_merge.adapters.tensor_names import TensorName
from vllm_merge.serving.memory.slots import SlotBuffer
from vllm_merge.serving.worker.experts import DOWN, projections, whole_experts

Loader = Callable[[Any, Any], Any]


# -- in the worker ------------------------------------------------------------------------------------------------------


def wrap_worker(on_manager: Callable[[Any, Any], None], load: Loader) -> None:
    """Install both worker hooks, once per process.

    on_manager(worker_lora_manager, vllm_config) runs when the LoRA slots exist. load(worker_lora_manager, lora_request)
    returns a LoRAModel, or None for requests that are not ours, which vLLM then loads as always.
    """
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager, WorkerLoRAManager

    if getattr(WorkerLoRAManager._load_adapter, "_vllm_merge", False):
        return
    original_load = WorkerLoRAManager._load_adapter

    @functools.wraps(original_load)
    def load_adapter(self: Any, lora_request: Any, *args: Any, **kwargs: Any) -> Any:
        model = load(self, lora_request)
        return model if model is not None else original_load(self, lora_request, *args, **kwargs)

    load_adapter._vllm_merge = True  # type: ignore[attr-defined]
    WorkerLoRAManager._load_adapter = load_adapter

    for owner in (WorkerLoRAManager, LRUCacheWorkerLoRAManager):
        if "create_lora_manager" not in vars(owner):
            continue
        original_create = vars(owner)["create_lora_manager"]

        def create_lora_manager(self: Any, *args: Any, __original: Any = original_create, **kwargs: Any) -> Any:
            model = __original(self, *args, **kwargs)
            bound = inspect.signature(__original).bind(self, *args, **kwargs)
            on_manager(self, bound.arguments.get("vllm_config"))
            return model

        owner.create_lora_manager = functools.wraps(original_create)(create_lora_manager)


def mend_rows_without_lora() -> bool:
    """On the CPU, make vLLM's LoRA kernels leave base-model rows alone; says whether there was anything to mend.

    The torch kernels take the row index -1, "no LoRA", as the last slot. Zeroing those rows after the shrink by A is
    enough: what the expand by B then adds to them is zero. Embeddings have no shrink: there they are zeroed before the
    expand.
    """
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    original, expand = lora_ops.bgmv_shrink, lora_ops.bgmv_expand
    probe = torch.zeros(1, 1)
    original(torch.ones(1, 1), torch.ones(1, 1, 1, 1), probe, torch.tensor([-1]), 1.0)
    if not probe.any():
        return False

    @functools.wraps(original)
    def bgmv_shrink(inputs: Tensor, weights: Tensor, output: Tensor, indices: Tensor, scaling: float = 1.0) -> None:
        original(inputs, weights, output, indices, scaling)
        output[indices < 0] = 0

    @functools.wraps(expand)
    def bgmv_expand(inputs: Tensor, weights: Tensor, output: Tensor, indices: Tensor, add_inputs: bool = True) -> None:
        expand(inputs * (indices >= 0)[:, None], weights, output, indices, add_inputs)

    lora_ops.bgmv_shrink = punica_cpu.bgmv_shrink = bgmv_shrink
    lora_ops.bgmv_expand = punica_cpu.bgmv_expand = bgmv_expand
    return True


def mend_prompt_logprobs() -> None:
    """On the CPU, keep a request for prompt log-probabilities beside others from ending the engine.

    The rows are then one request's prompt while the indices are the batch's requests, and lm_head's LoRA multiplies them.
    What is left out is LoRA on lm_head, and only for prompt tokens.
    """
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    original = PunicaWrapperCPU.add_lora_logits

    @functools.wraps(original)
    def add_lora_logits(self: Any, y: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if x.reshape(-1, x.shape[-1]).shape[0] != self.sampler_indices.shape[0]:
            return None  # y is updated in place, so this leaves it as it is
        return original(self, y, x, *args, **kwargs)

    PunicaWrapperCPU.add_lora_logits = add_lora_logits


def _weights_mapper(manager: Any) -> Any:
    """The model's renames of checkpoint names, without the fusing of q, k and v, which vLLM does itself later."""
    mapper = getattr(manager.model, "hf_to_vllm_mapper", None)
    for method in ("get_rename_mapper", "get_unstacked_mapper"):  # 0.27 and newer, 0.26
        if mapper is not None and hasattr(mapper, method):
            return getattr(mapper, method)()
    return mapper


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
        embedding = _keeps_tokens(layers.get(_inside_name(worker_manager, module)))
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
        weights_mapper=_weights_mapper(manager),
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
    inside = {_inside_name(worker_manager, module): pair for module, pair in factors.items()}
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
        views[name, "A"], views[name, "B"] = _sliced(layer, [a for a, _ in pairs], [b for _, b in pairs])
        if _keeps_tokens(layer):  # a row for each token: the layer's A is the transpose
            views[name, "A"] = [None if a is None else a.mT.contiguous() for a in views[name, "A"]]
    taken = {key: iter(value) for key, value in views.items()}
    return [next(taken[b.layer, b.letter]) if (b.layer, b.letter) in taken else None for b in buffers]


def _sliced(
    layer: Any, a: list[Tensor | None], b: list[Tensor | None]
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """A layer's own tensor-parallel slicing, for any number of slices."""
    if getattr(layer, "tp_size", 1) == 1 or isinstance(layer.lora_a_stacked, Tensor):
        return a, b
    if len(a) > 1:
        return layer.slice_lora_a(a), layer.slice_lora_b(b)
    return [layer.slice_lora_a(a[0])], [layer.slice_lora_b(b[0])]


def _keeps_tokens(layer: Any) -> bool:
    """Whether a layer is an embedding, whose stacked A is (slots, tokens, rank)."""
    stacked = getattr(layer, "lora_a_stacked", None)
    return isinstance(stacked, Tensor) and stacked.ndim == 3


def wrap_activation(fill: Callable[[Any, int], Any | None]) -> None:
    """Give our artifacts' slots to `fill(lora_model, slot)`, once per process.

    True from it: the slot is filled, and becomes visible by one assignment after that, on the stream that the next step
    runs on. A LoRAModel: vLLM copies from it, and only for that moment it is registered. None: the slot is left to vLLM.
    """
    from vllm.lora.model_manager import LoRAModelManager

    original = LoRAModelManager.activate_adapter
    if getattr(original, "_vllm_merge", False):
        return

    @functools.wraps(original)
    def activate_adapter(self: Any, lora_id: int) -> bool:
        if lora_id not in self._active_adapters and None in self.lora_index_to_id:
            slot = self.lora_index_to_id.index(None)
            standing = self._registered_adapters[lora_id]
            filled = fill(standing, slot)
            if filled is True:
                self._active_adapters[lora_id] = None
                self.lora_index_to_id[slot] = lora_id
                return True
            if filled is not None:
                self._registered_adapters[lora_id] = filled
                try:
                    return bool(original(self, lora_id))
                finally:
                    self._registered_adapters[lora_id] = standing
        return bool(original(self, lora_id))

    activate_adapter._vllm_merge = True  # type: ignore[attr-defined]
    LoRAModelManager.activate_adapter = activate_adapter


def wrap_sleep(before: Callable[[], None], after: Callable[[Sequence[str] | None], None]) -> None:
    """Call before() when this process's worker falls asleep and after(tags) when it has woken up, once per process."""
    from vllm.v1.worker.gpu_worker import Worker

    sleep, wake_up = Worker.sleep, Worker.wake_up
    if getattr(sleep, "_vllm_merge", False):
        return

    @functools.wraps(sleep)
    def fall_asleep(self: Any, *args: Any, **kwargs: Any) -> Any:
        before()
        return sleep(self, *args, **kwargs)

    @functools.wraps(wake_up)
    def wake(self: Any, *args: Any, **kwargs: Any) -> Any:
        done = wake_up(self, *args, **kwargs)
        after(inspect.signature(wake_up).bind(self, *args, **kwargs).arguments.get("tags"))
        return done

    fall_asleep._vllm_merge = True  # type: ignore[attr-defined]
    Worker.sleep, Worker.wake_up = fall_asleep, wake


def remove_adapters(worker_manager: Any, first_id: int) -> None:
    """Take every adapter with an id from `first_id` on out of its slot and forget it; vLLM loads it anew for its next step."""
    manager = worker_manager._adapter_manager
    for lora_id in manager.list_adapters():
        if lora_id >= first_id:
            manager.remove_adapter(lora_id)


def _inside_name(worker_manager: Any, module: str) -> str:
    """The model's own name of a module that checkpoints call `module`."""
    from vllm.lora.utils import parse_fine_tuned_lora_name

    mapper = _weights_mapper(worker_manager._adapter_manager)
    name, _ = parse_fine_tuned_lora_name(f"base_model.model.{module}.lora_A.weight", mapper)
    return str(name)


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
        inside = _inside_name(worker_manager, module)
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
    if _keeps_tokens(layer):
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
    sliced_a, sliced_b = _sliced(layer, [pair[0] for pair in pairs], [pair[1] for pair in pairs])
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


# -- in the API process -------------------------------------------------------------------------------------------------


def wrap_engine(
    engine_client: Any,
    lease: Callable[[Any], Any],
    counter: Callable[[], Callable[[Any], None] | None] = lambda: None,
) -> None:
    """Hold `lease(lora_request)` (an async context manager giving the request to use) around generate and encode.

    lease(request) is None for requests that are not ours; those go straight through. counter() gives what is to be called
    with every output, or None.
    """
    for name in ("generate", "encode"):
        original = getattr(engine_client, name, None)
        if original is not None and not getattr(original, "_vllm_merge", False):
            setattr(engine_client, name, _leased(original, lease, counter))


BARE_STATES = (
    ("vllm.entrypoints.launchers.api_server.app_state", "init_endpoint_plugins_state"),
    ("vllm.entrypoints.openai.api_server", "_init_endpoint_plugins_state"),  # 0.26
)


def wrap_bare_states(initialise: Callable[[Any, Any, Any], Awaitable[None]]) -> None:
    """Call `initialise(engine_client, state, args)` for application states that vLLM makes without endpoint plugins.

    So does its batch runner, which has requests and no HTTP. Only in processes that have imported what makes such states.
    """
    for place, name in BARE_STATES:
        module = sys.modules.get(place)
        original = getattr(module, name, None)
        if original is not None and not getattr(original, "_vllm_merge", False):
            setattr(module, name, _initialising(original, initialise))


def _initialising(original: Callable[..., Awaitable[None]], initialise: Callable[..., Awaitable[None]]) -> Any:
    @functools.wraps(original)
    async def init(engine_client: Any, state: Any, args: Any) -> None:
        await original(engine_client, state, args)
        if not hasattr(state, "endpoint_plugins"):
            await initialise(engine_client, state, args)

    init._vllm_merge = True  # type: ignore[attr-defined]
    return init


def _leased(
    original: Callable[..., AsyncGenerator[Any, None]],
    lease: Callable[[Any], Any],
    counter: Callable[[], Callable[[Any], None] | None],
) -> Callable[..., AsyncGenerator[Any, None]]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        bound = signature.bind(*args, **kwargs)
        held = lease(bound.arguments.get("lora_request"))
        count = counter()
        if held is not None:
            return run(bound, held, count)
        outputs = original(*args, **kwargs)
        return outputs if count is None else counted(outputs, count)

    async def run(
        bound: inspect.BoundArguments, held: Any, count: Callable[[Any], None] | None
    ) -> AsyncGenerator[Any, None]:
        async with held as holder:
            bound.arguments["lora_request"] = holder.lora_request
            # Closed here and now, so that a client that left aborts its request before the lease ends.
            async with contextlib.aclosing(original(*bound.args, **bound.kwargs)) as outputs:
                async for output in outputs:
                    await holder.check()
                    if count is not None:
                        count(output)
                    yield output

    async def counted(outputs: AsyncGenerator[Any, None], count: Callable[[Any], None]) -> AsyncGenerator[Any, None]:
        async with contextlib.aclosing(outputs):
            async for output in outputs:
                count(output)
                yield output

    call._vllm_merge = True  # type: ignore[attr-defined]
    return call


def lora_request(name: str, lora_id: int, path: str) -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest(lora_name=name, lora_int_id=lora_id, lora_path=path)


def publish(serving_models: Any, requests: Callable[[], Mapping[str, Any]], is_ours: Callable[[str], bool]) -> None:
    """List our names in /v1/models beside vLLM's: requests() gives {name: LoRARequest}; what is not ours stays as it is."""
    original = serving_models.show_available_models

    async def show_available_models() -> Any:
        models = await original()
        models.data = [card for card in models.data if not is_ours(str(card.root))]
        base = models.data[0]  # vLLM lists its base models first
        models.data += [
            type(base)(id=name, root=request.lora_name, parent=base.id, permission=[type(base.permission[0])()])
            for name, request in requests().items()
        ]
        return models

    serving_models.show_available_models = show_available_models


def lora_config(engine_client: Any) -> Any | None:
    return engine_client.vllm_config.lora_config


def parallel_config(engine_client: Any) -> Any:
    """How many engines and ranks this front end talks to: see workers.wanted_places."""
    return engine_client.vllm_config.parallel_config
