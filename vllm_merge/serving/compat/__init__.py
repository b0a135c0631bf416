# SPDX-License-Identifier: Apache-2.0
"""Every touch of vLLM that its documentation does not promise.

ground.py is the register: each name, why it is touched, how, and when the touch can go.
"""

from vllm_merge.serving.compat.adapters import (
    device,
    is_registered,
    lora_model,
    marker_lora_model,
    max_rank,
    packed_lora_model,
    place,
    registered_bytes,
    remove_adapters,
    slot_dtype,
    slot_ids,
    zero_lora_model,
)
from vllm_merge.serving.compat.api import (
    BARE_STATES,
    lora_config,
    lora_request,
    parallel_config,
    publish,
    wrap_bare_states,
    wrap_engine,
)
from vllm_merge.serving.compat.fit import misfits
from vllm_merge.serving.compat.hooks import Loader, wrap_activation, wrap_sleep, wrap_worker
from vllm_merge.serving.compat.layers import slot_buffers, slot_views
from vllm_merge.serving.compat.mends import mend_prompt_logprobs, mend_rows_without_lora

__all__ = [
    "BARE_STATES",
    "Loader",
    "device",
    "is_registered",
    "lora_config",
    "lora_model",
    "lora_request",
    "marker_lora_model",
    "max_rank",
    "mend_prompt_logprobs",
    "mend_rows_without_lora",
    "misfits",
    "packed_lora_model",
    "parallel_config",
    "place",
    "publish",
    "registered_bytes",
    "remove_adapters",
    "slot_buffers",
    "slot_dtype",
    "slot_ids",
    "slot_views",
    "wrap_activation",
    "wrap_bare_states",
    "wrap_engine",
    "wrap_sleep",
    "wrap_worker",
    "zero_lora_model",
]
