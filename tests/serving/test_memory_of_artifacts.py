# SPDX-License-Identifier: Apache-2.0
"""Where an artifact lies on the CPU: its memory is the system's again as soon as nobody uses it."""

import sys
from pathlib import Path

import pytest
import torch

from vllm_merge.serving.memory.slots import flat_copy

MIB = 1 << 20
CPU = torch.device("cpu")


def is_mapped(address: int) -> bool:
    ranges = (line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines())
    return any(int(first, 16) <= address < int(last, 16) for first, last in ranges)


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what is mapped")
def test_what_is_evicted_is_given_back_to_the_system():
    """Malloc would keep it for later: it has seen larger blocks come and go, and keeps the like of these from then on."""
    torch.empty(20 * MIB, dtype=torch.uint8)
    torch.empty(16 * MIB, dtype=torch.uint8)
    factors = {"m": (torch.ones(16, 1 << 17), torch.ones(1 << 17, 16))}
    held = [flat_copy(factors, CPU, torch.float32) for _ in range(3)]
    addresses = [storage.data_ptr() for storage, _ in held]
    assert all(map(is_mapped, addresses))
    del held[1]
    assert [is_mapped(address) for address in addresses] == [True, False, True]
    storage, views = held[-1]
    del held, storage
    assert is_mapped(addresses[2]), "a view keeps it"
    assert all(torch.equal(view, factor) for view, factor in zip(views["m"], factors["m"], strict=True))


def test_factors_of_rank_zero_take_nothing():
    storage, views = flat_copy({"m": (torch.zeros(0, 8), torch.zeros(8, 0))}, CPU, torch.float32)
    assert storage.numel() == 0
    assert [view.shape for view in views["m"]] == [(0, 8), (8, 0)]
