# SPDX-License-Identifier: Apache-2.0
"""The run of bytes in which an adapter's factors lie."""

from __future__ import annotations

import torch

from vllm_merge import Adapter, LoraFactors


def test_a_run_keeps_float32_where_a_gpu_can_read_it() -> None:
    """Behind an odd number of halves before the adapter's own, and an odd number of its own."""
    memory = torch.zeros(64, dtype=torch.uint8)
    a, b = memory[2:20].view(torch.float16).view(1, 9), memory[20:40].view(torch.float32).view(5, 1)
    run = Adapter("x", {"m": LoraFactors(a, b)}).places.run
    assert run is not None
    assert (b.data_ptr() - run.data_ptr()) % b.itemsize == 0
    assert run.data_ptr() <= a.data_ptr()
    assert run.data_ptr() + run.numel() == b.data_ptr() + b.nbytes
