# SPDX-License-Identifier: Apache-2.0
"""How long a plan takes, measured: it is run on the first and the last module of each shape, and scaled by their number."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from vllm_merge.adapters.factors import Adapter, natural_key
from vllm_merge.errors import MergeCancelled
from vllm_merge.plan_runner import run_plan
from vllm_merge.recipe.plan import Plan

BUDGET_SECONDS = 5.0


@dataclass(slots=True)
class Sample:
    """seconds: of the whole merge, without reading; at least that long where the sample was not `complete`.

    modules: how many were merged for it. energy: the share that each of them kept, None where nothing was cut off.
    """

    seconds: float = 0.0
    complete: bool = True
    modules: int = 0
    energy: dict[str, float | None] = field(default_factory=dict)


def measure(plan: Plan, adapters: Mapping[str, Adapter], device: str, budget: float = BUDGET_SECONDS) -> Sample:
    """Run `plan` on a sample of the adapters' modules, for about `budget` seconds at most."""
    by_shape: dict[tuple[int, int], set[str]] = {}
    for adapter in adapters.values():
        for module, factors in adapter.factors.items():
            by_shape.setdefault(factors.shape, set()).add(module)
    shapes = sorted(by_shape, key=lambda shape: shape[0] * shape[1])
    sample, deadline = Sample(), time.perf_counter() + budget
    try:
        for index, shape in enumerate(shapes):
            names = sorted(by_shape[shape], key=natural_key)
            chosen = set(names[:1] + names[-1:])
            if index == 0:  # the first run of everything takes longer than the later ones
                _run(plan, adapters, chosen, device, deadline, Sample())
            seconds = _run(plan, adapters, chosen, device, deadline, sample)
            sample.seconds += seconds * len(names) / len(chosen)
            sample.modules += len(chosen)
    except MergeCancelled:
        sample.complete = False
        sample.seconds = max(sample.seconds, budget)
    return sample


def _run(
    plan: Plan, adapters: Mapping[str, Adapter], chosen: set[str], device: str, deadline: float, into: Sample
) -> float:
    parts = {
        name: Adapter(
            name,
            {module: factors for module, factors in adapter.factors.items() if module in chosen},
            content_hash=adapter.content_hash,
        )
        for name, adapter in adapters.items()
    }
    started = time.perf_counter()
    with torch.inference_mode():
        merged = run_plan(
            plan,
            device=device,
            load_adapter=lambda planned: parts[planned.name],
            cancelled=lambda: time.perf_counter() > deadline,
        )
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)
    into.energy.update(merged.report.energy_kept)
    return time.perf_counter() - started
