# SPDX-License-Identifier: Apache-2.0
"""A method that the benchmarks add to vLLM's worker (--worker-extension-cls): how much memory it holds."""

from __future__ import annotations

import torch


class WorkerMemory:
    """Mixed into the worker's class."""

    def memory_in_bytes(self) -> dict[str, int]:
        """{allocated, reserved} on the device and {pinned} host memory, by torch's allocators; empty on a CPU."""
        if not torch.cuda.is_available():
            return {}
        host = torch.cuda.host_memory_stats()
        return {
            "allocated": torch.cuda.memory_allocated(),
            "reserved": torch.cuda.memory_reserved(),
            "pinned": int(host.get("allocated_bytes.current", 0)),
        }
