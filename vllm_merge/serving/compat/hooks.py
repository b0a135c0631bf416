# SPDX-License-Identifier: Apache-2.0
"""Where vLLM's workers call us: when LoRA slots exist, when an adapter is loaded, when a slot is filled, around sleep."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

Loader = Callable[[Any, Any], Any]


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
