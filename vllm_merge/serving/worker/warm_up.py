# SPDX-License-Identifier: Apache-2.0
"""A first merge of each kind while the server starts.

What a GPU does for the first time takes long and makes everybody wait: kernels are compiled (in the interpreter's time) and
loaded (which waits for the device). So it is done before there is anybody to wait.
"""

from __future__ import annotations

import torch

from vllm_merge.adapters.factors import Adapter, LoraFactors
from vllm_merge.engine import merge

RANKS = (16, 32, 64)  # the kernels that make products come in these widths
KINDS = (
    ("linear", None, "auto"),
    ("ties", "knots", "auto"),
    ("ties", "knots", 16),
    ("ties", "delta", 16),
    ("tsv_m", None, "auto"),
)


def warm_up(device: torch.device, dtype: torch.dtype) -> None:
    """Merge small random adapters on a GPU, whose factors are bfloat16 in pinned memory, as those of files are."""
    if device.type != "cuda":
        return
    for rank in RANKS:
        adapters = [_adapter(f"warm-up {seed}", rank, seed) for seed in range(3)]
        for method, space, result_rank in KINDS:
            if rank == RANKS[0] or space == "knots":
                merge(
                    adapters,
                    merge_method=method,
                    space=space,
                    rank=result_rank,
                    device=device,
                    dtype=dtype,
                    report="brief",
                    workspace_bytes=64 << 20,
                )
    torch.cuda.synchronize(device)


def _adapter(name: str, rank: int, seed: int) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for module in range(4):
        a, b = torch.randn(rank, 512, generator=generator), torch.randn(256, rank, generator=generator)
        factors[f"layers.{module}"] = LoraFactors(a.bfloat16().pin_memory(), b.bfloat16().pin_memory())
    return Adapter(name, factors, content_hash=f"{seed:064x}")
