# SPDX-License-Identifier: Apache-2.0
"""What the truncation of a `delta` merge keeps, against the exact truncated SVD of the same dense result.

TIES is made anew here, dense, with a threshold from a sample of the entries of the whole model; the dense result of
DARE-TIES comes from a merge of the sampled modules alone without truncation, which has the same masks.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from merge_cases import Case
from torch import Tensor

from vllm_merge import Adapter, merge

SAMPLED = 10
THRESHOLD_ENTRIES = 4_000_000  # per adapter
DENSITY = 0.2  # TIES' default


def kept_against_exact(case: Case, adapters: Sequence[Adapter], device: str, seconds: float) -> dict[str, Any]:
    """{"least", "mean", "modules"}: energy that the result keeps over what the best one of its rank keeps, by module.

    Modules are spread over the depth and the shapes; after `seconds` no further one is begun.
    """
    deadline = time.monotonic() + seconds
    names = list(adapters[0].factors)
    step = max(1, len(names) // SAMPLED)
    chosen = [names[(index * step + index % 7) % len(names)] for index in range(min(SAMPLED, len(names)))]
    assert isinstance(case.rank, int)
    merged = merge(adapters, **case.arguments(), device=device)
    thresholds = _thresholds(adapters) if case.method == "ties" else None
    shares = []
    for module in chosen:
        if time.monotonic() > deadline:
            break
        if thresholds is not None:
            exact = _ties(adapters, module, thresholds)
        else:
            only = [Adapter(a.name, {module: a.factors[module]}, content_hash=a.content_hash) for a in adapters]
            whole = {**case.arguments(), "rank": "lossless"}
            exact = merge(only, **whole, device=device).delta(module)
        shares.append(_share(exact.double(), merged.delta(module).double(), case.rank))
    return {
        "least": round(min(shares), 6) if shares else None,
        "mean": round(sum(shares) / len(shares), 6) if shares else None,
        "modules": len(shares),
    }


def _share(exact: Tensor, approximation: Tensor, rank: int) -> float:
    """‖X‖² − ‖X − Y‖², what Y keeps of X, over the sum of the `rank` largest squared singular values of X."""
    short = exact if exact.shape[0] <= exact.shape[1] else exact.mT
    best = torch.linalg.eigvalsh(short @ short.mT)[-rank:].sum()
    return float((exact.square().sum() - (exact - approximation).square().sum()) / best)


def _thresholds(adapters: Sequence[Adapter]) -> list[Tensor]:
    """For each adapter the magnitude that the share DENSITY of its entries reaches, from a sample of rows."""
    found = []
    for adapter in adapters:
        total = sum(f.shape[0] * f.shape[1] for f in adapter.factors.values())
        stride = max(1, total // THRESHOLD_ENTRIES)
        sample = torch.cat([(f.B[::stride].float() @ f.A.float()).abs().flatten() for f in adapter.factors.values()])
        found.append(sample.kthvalue(max(1, int((1 - DENSITY) * len(sample)))).values)
    return found


def _ties(adapters: Sequence[Adapter], module: str, thresholds: Sequence[Tensor]) -> Tensor:
    """Trim, elect, and average what agrees (arXiv:2306.01708, §3), dense."""
    deltas = []
    for adapter, threshold in zip(adapters, thresholds, strict=True):
        delta = adapter.factors[module].delta()
        deltas.append(delta * (delta.abs() >= threshold))
    stacked = torch.stack(deltas)
    agreeing = stacked * (stacked.sign() == stacked.sum(0).sign())
    return agreeing.sum(0) / (agreeing != 0).sum(0).clamp_min(1)
