# SPDX-License-Identifier: Apache-2.0
"""What a GPU does for the first time is done while the server starts, before there is anybody to wait.

Kernels are compiled (mostly in the interpreter's time; Triton keeps them on disk, so a second start is quick), then loaded, which
waits for the device; so are those of the libraries for products and decompositions, by first merges of each kind.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from vllm_merge.adapters.factors import Adapter, LoraFactors
from vllm_merge.engine import merge

logger = logging.getLogger("vllm_merge.worker")

COMPILERS = 8  # threads; the compiler leaves the interpreter to others for a part of its time
ADAPTERS, RANK = 8, 16
MODULES = 2  # of each shape: libraries take a batch otherwise than a single matrix
KINDS = (
    ("linear", None, "auto"),
    ("ties", "knots", "auto"),
    ("ties", "knots", RANK),
    ("ties", "delta", RANK),
    ("dare_ties", "knots", "auto"),
    ("tsv_m", None, "auto"),
    ("iso_c", None, "auto"),
    ("ctm", None, "auto"),
    ("do_merging", None, "auto"),
)


def compile_kernels(device: torch.device, dtype: torch.dtype, widest: int) -> None:
    """Every variant of the merges' own kernels, for adapters of a rank up to `widest`, on a GPU."""
    if device.type != "cuda":
        return
    from vllm_merge.kernels.variants import Launch, variants

    def launch(one: Launch) -> None:
        torch.cuda.set_device(device)
        with torch.inference_mode():
            one()

    started = time.perf_counter()
    launches = list(variants(device, widest, dtype))
    with ThreadPoolExecutor(min(COMPILERS, os.cpu_count() or 1), "vllm-merge-compile") as pool:
        list(pool.map(launch, launches))
    for one in launches:  # once more: of two threads that were the first with a kernel, one's may have been forgotten
        launch(one)
    torch.cuda.synchronize(device)
    logger.info("kernels of merges: %d launches, %.1f s", len(launches), time.perf_counter() - started)


def warm_up(device: torch.device, dtype: torch.dtype, shapes: Sequence[tuple[int, int]], workspace_bytes: int) -> None:
    """A merge of each kind, on a GPU, of modules of the model's own shapes (d_out, d_in)."""
    if device.type != "cuda":
        return
    started = time.perf_counter()
    for one in merges(device, dtype, shapes, workspace_bytes):
        one()
    torch.cuda.synchronize(device)
    logger.info("first merges of each kind: %.1f s", time.perf_counter() - started)


def merges(
    device: torch.device, dtype: torch.dtype, shapes: Sequence[tuple[int, int]], workspace_bytes: int
) -> Iterator[Callable[[], object]]:
    """Of small random adapters in bfloat16; for a GPU in pinned memory, one run each, as those of files are."""
    adapters = [_adapter(f"warm-up {seed}", shapes, seed, pinned=device.type == "cuda") for seed in range(ADAPTERS)]
    for method, space, rank in KINDS:

        def one(method: str = method, space: str | None = space, rank: int | str = rank) -> object:
            return merge(
                adapters,
                merge_method=method,
                space=space,
                rank=rank,
                device=device,
                dtype=dtype,
                report="brief",
                workspace_bytes=workspace_bytes,
            )

        yield one


def _adapter(name: str, shapes: Sequence[tuple[int, int]], seed: int, *, pinned: bool) -> Adapter:
    sizes = [shape for shape in shapes for _ in range(MODULES)]
    numbers = torch.randn(RANK * sum(map(sum, sizes)), generator=torch.Generator().manual_seed(seed)).bfloat16()
    whole = numbers.pin_memory() if pinned else numbers
    run = iter(torch.split(whole, [RANK * size for d_out, d_in in sizes for size in (d_in, d_out)]))
    factors = {
        f"layers.{index}": LoraFactors(next(run).view(RANK, d_in), next(run).view(d_out, RANK))
        for index, (d_out, d_in) in enumerate(sizes)
    }
    return Adapter(name, factors, content_hash=f"{seed:064x}")
