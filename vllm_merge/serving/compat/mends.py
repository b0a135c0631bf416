# SPDX-License-Identifier: Apache-2.0
"""Faults of vLLM's LoRA on the CPU, mended."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor


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
