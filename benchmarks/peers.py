# SPDX-License-Identifier: Apache-2.0
"""What others need for the same merge: PEFT's add_weighted_adapter, and the published KnOTS route.

Both work module by module, so that one module of each shape is measured, once, and multiplied by how many there are.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from rates import shares
from shapes import ModelShape, shape_of
from torch import Tensor, nn

from vllm_merge.forecast.probe import best_seconds, seconds_of

PEFT_TYPES = ("linear", "cat", "svd", "ties_svd")
DENSITY = 0.2
REPEAT_BELOW = 1.0  # seconds: shorter calls are made again, since the first one of everything takes longer


Prepare = Callable[[int, int], Callable[[], object]]


def measure_peers(point: tuple[str, int, int], device: str, seconds: float) -> Iterator[dict[str, Any]]:
    """Rows for n adapters of rank r: for each peer the seconds of the whole model, by sum over the shapes.

    Small shapes come first. Another shape is left out, and named in the row, where the time is up or would be before it is
    done: the row's seconds are then a lower bound.
    """
    import peft  # noqa: F401  (it takes seconds, which are no peer's)

    shape, n, r = shape_of(point[0]), point[1], point[2]
    tasks: list[tuple[str, str, int, Prepare]] = [
        ("peft", f"add_weighted_adapter {kind}", 1, partial(_peft, kind, n, r, device)) for kind in PEFT_TYPES
    ]
    tasks.append(("knots", "TIES after torch.linalg.svd of all", n, partial(_knots, n, r, device)))
    deadlines = shares(seconds, [1] * len(tasks))
    for (peer, what, wide, prepare), deadline in zip(tasks, deadlines, strict=True):
        found = _by_sum(shape, prepare, wide, deadline, device)
        yield {"peer": peer, "what": what, "shape": shape.name, "n": n, "r": r, **found}


def _by_sum(shape: ModelShape, prepare: Prepare, wide: int, deadline: float, device: str) -> dict[str, Any]:
    """wide: how many times as wide as ΔW the matrix is whose SVD is made, which says how long a shape will take."""
    counts = Counter(shape.projections.values())
    total = rate = 0.0
    by_shape: dict[str, float] = {}
    left_out: list[str] = []
    for rows, cols in sorted(counts, key=lambda size: _operations(size[0], size[1], wide)):
        label, operations = f"{rows}x{cols}", _operations(rows, cols, wide)
        if by_shape and time.monotonic() + rate * operations > deadline:
            left_out.append(label)
            continue
        act, on = prepare(rows, cols), torch.device(device)
        took = seconds_of(act, on)
        if took < REPEAT_BELOW:
            took = best_seconds(act, on, trials=2)
        rate = took / operations
        by_shape[label] = round(took, 5)
        total += took * counts[rows, cols] * shape.layers
    return {
        "seconds": round(total, 3),
        "measured_modules": len(by_shape),
        "scaled": True,
        "seconds_by_shape": by_shape,
        "left_out": left_out,
    }


def _operations(rows: int, cols: int, wide: int) -> float:
    """What an SVD of (rows, wide · cols) goes with."""
    return float(min(rows, wide * cols)) ** 2 * max(rows, wide * cols)


def _peft(kind: str, n: int, r: int, device: str, rows: int, cols: int) -> Callable[[], object]:
    """PEFT on a model of one linear layer with n random adapters."""
    from peft import LoraConfig, get_peft_model

    base = nn.Module()
    base.layer = nn.Linear(cols, rows, bias=False, device=device, dtype=torch.bfloat16)
    config = LoraConfig(r=r, lora_alpha=r, target_modules=["layer"], init_lora_weights=False)
    model: Any = get_peft_model(base, config, adapter_name="a0")
    names = [f"a{index}" for index in range(n)]
    for name in names[1:]:
        model.add_adapter(name, config)
    model.to(device)
    options = {"density": DENSITY} if "ties" in kind else {}

    def act() -> None:
        if "merged" in model.peft_config:
            model.delete_adapter("merged")
        with torch.no_grad():
            model.add_weighted_adapter(names, [1.0] * n, "merged", combination_type=kind, **options)

    return act


def _knots(n: int, r: int, device: str, rows: int, cols: int) -> Callable[[], object]:
    """Stoica et al., arXiv:2410.19735, §4: one SVD of [ΔW_1 … ΔW_n], TIES on the pieces of Vᵀ, and U times the result."""
    generator = torch.Generator(device).manual_seed(0)
    factors = [
        (
            torch.randn(rows, r, generator=generator, device=device),
            torch.randn(r, cols, generator=generator, device=device),
        )
        for _ in range(n)
    ]

    def act() -> Tensor:
        left, values, right = torch.linalg.svd(torch.cat([b @ a for b, a in factors], dim=1), full_matrices=False)
        pieces = torch.stack(torch.split(values[:, None] * right, cols, dim=1))
        flat = pieces.flatten(1).abs()
        kept = max(1, int(DENSITY * flat.shape[1]))
        threshold = flat.kthvalue(flat.shape[1] - kept + 1, dim=1).values
        pieces = pieces * (pieces.abs() >= threshold[:, None, None])
        agreeing = pieces * (pieces.sign() == pieces.sum(0).sign())
        merged: Tensor = left @ (agreeing.sum(0) / (agreeing != 0).sum(0).clamp_min(1))
        return merged

    return act
