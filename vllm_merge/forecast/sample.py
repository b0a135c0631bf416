# SPDX-License-Identifier: Apache-2.0
"""How long a plan takes, measured: it is run on the first and the last module of each shape, and scaled by their number."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from vllm_merge.adapters.factors import Adapter, natural_key
from vllm_merge.artifact import MergedAdapter
from vllm_merge.errors import MergeCancelled
from vllm_merge.plan_runner import run_plan
from vllm_merge.recipe.plan import Plan

BUDGET_SECONDS = 5.0


@dataclass(slots=True)
class Sample:
    """seconds: of the whole merge, without reading; at least that long where the sample was not `complete`.

    modules: how many were merged for it. energy: the share that each of them kept, None where nothing was cut off;
    empty where it was not asked for or took too long.
    """

    seconds: float = 0.0
    complete: bool = True
    modules: int = 0
    energy: dict[str, float | None] = field(default_factory=dict)


def measure(
    plan: Plan, adapters: Mapping[str, Adapter], device: str, *, energy: bool, budget: float = BUDGET_SECONDS
) -> Sample:
    """Run `plan` on a sample of the adapters' modules, for about `budget` seconds, and as long again for the energy."""
    by_shape: dict[tuple[int, int], set[str]] = {}
    for adapter in adapters.values():
        for module, factors in adapter.factors.items():
            by_shape.setdefault(factors.shape, set()).add(module)
    chosen: list[tuple[set[str], int]] = []
    for shape in sorted(by_shape, key=lambda shape: shape[0] * shape[1]):
        names = sorted(by_shape[shape], key=natural_key)
        chosen.append(({names[0], names[-1]}, len(names)))
    sample, deadline = Sample(), time.perf_counter() + budget
    for index, (modules, count) in enumerate(chosen):
        if index == 0:  # the first run of everything takes longer than the later ones
            _run(plan, adapters, modules, device, deadline)
        started = time.perf_counter()
        done = _run(plan, adapters, modules, device, deadline)
        sample.seconds += (time.perf_counter() - started) * count / len(modules)
        sample.modules += len(modules)
        if done is None:
            sample.complete = False
            return sample
    if energy:
        # All at once: methods with a threshold over the whole model have it over the whole sample.
        everything = set[str]().union(*(modules for modules, _ in chosen))
        merged = _run(plan, adapters, everything, device, time.perf_counter() + budget)
        sample.energy = {} if merged is None else merged.report.energy_kept
    return sample


def _run(
    plan: Plan, adapters: Mapping[str, Adapter], chosen: set[str], device: str, deadline: float
) -> MergedAdapter | None:
    """The plan's result for these modules, or None where the deadline came first."""
    parts = {
        name: Adapter(
            name,
            {module: factors for module, factors in adapter.factors.items() if module in chosen},
            content_hash=adapter.content_hash,
            metadata=adapter.metadata,
        )
        for name, adapter in adapters.items()
    }
    try:
        with torch.inference_mode():
            merged = run_plan(
                plan,
                device=device,
                load_adapter=lambda planned: parts[planned.name],
                cancelled=lambda: time.perf_counter() > deadline,
                report="brief",
            )
    except MergeCancelled:
        return None
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return merged
