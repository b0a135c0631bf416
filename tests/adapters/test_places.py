# SPDX-License-Identifier: Apache-2.0
"""Where an adapter's factors lie: found out once, and as one run of bytes."""

from __future__ import annotations

import torch

from vllm_merge import Adapter, LoraFactors, merge


def test_a_run_keeps_float32_where_a_gpu_can_read_it() -> None:
    """Behind an odd number of halves before the adapter's own, and an odd number of its own."""
    memory = torch.zeros(64, dtype=torch.uint8)
    a, b = memory[2:20].view(torch.float16).view(1, 9), memory[20:40].view(torch.float32).view(5, 1)
    run = Adapter("x", {"m": LoraFactors(a, b)}).places.run
    assert run is not None
    assert (b.data_ptr() - run.data_ptr()) % b.itemsize == 0
    assert run.data_ptr() <= a.data_ptr()
    assert run.data_ptr() + run.numel() == b.data_ptr() + b.nbytes


def test_what_is_found_out_of_an_adapter_is_known_under_all_its_names() -> None:
    """A server gives the adapters that it keeps their names in the plan, at every merge."""
    kept = Adapter("kept", {"m": LoraFactors(torch.ones(2, 4), torch.ones(3, 2))})
    named = kept.named("a")
    merge([named, kept.named("b")], merge_method="linear")
    assert kept.found.zero is False
    assert kept.named("c").places is named.places
    assert kept.named("d").content_hash is named.content_hash
