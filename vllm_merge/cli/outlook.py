# SPDX-License-Identifier: Apache-2.0
"""What `plan` says of a plan before it is run."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, TypeAlias

from vllm_merge.adapters.peft import read_each
from vllm_merge.cli.files import Planned
from vllm_merge.cli.output import ProgressBar, duration
from vllm_merge.forecast.cautions import cautions
from vllm_merge.forecast.cost import cost_on
from vllm_merge.forecast.energy import Kept, kept_by_rank
from vllm_merge.forecast.overlap import Overlap
from vllm_merge.forecast.plan_cost import plan_cost
from vllm_merge.forecast.sample import Sample, measure
from vllm_merge.plan_runner import read_planned
from vllm_merge.recipe.bounds import stage_bounds
from vllm_merge.recipe.dtypes import BYTES
from vllm_merge.recipe.plan import EnergyRank, Plan
from vllm_merge.serving.launch import ACCEPTED_RANKS, accepted_rank


@dataclass(frozen=True)
class Energy:
    """The share of ‖ΔW‖² that the rank keeps: `overall`, and the least of any module.

    known: "all" (the rank cannot cut anything off), "exact" (from the spectra), "sample" (of the modules that were
    merged, with the thresholds of those alone), "asked" (the recipe asks for this much), or "no".
    """

    known: Literal["all", "exact", "sample", "asked", "no"]
    overall: float | None = None
    least: float | None = None
    module: str | None = None

    def in_words(self) -> str:
        if self.known == "all":
            return "all kept: the rank cuts nothing off"
        if self.known == "no":
            return "known after the merge only: the rule is no weighted sum, and the sample took too long"
        if self.known == "asked":
            return f"{self.least:.2%} of each module, as the recipe asks"
        least = f"{self.least:.2%}" + (f" ({self.module})" if self.module else "")
        if self.known == "exact":
            return f"{self.overall:.2%} kept, of each module at least {least}"
        return f"about {least} at the least of the modules merged to measure; others may keep less, the merge says how much"


@dataclass(frozen=True)
class Seconds:
    """merge: at least that, where not `complete`. device: where it would be merged.

    forecast_from: the device whose figures the seconds come from; None where modules were merged to measure.
    """

    read: float
    merge: float
    complete: bool
    measured_modules: int
    device: str
    forecast_from: str | None = None

    def in_words(self) -> str:
        least = "" if self.complete else "more than "
        if self.forecast_from is not None:
            how = f"on {self.device}, forecast from merges measured on {self.forecast_from}"
        else:
            how = f"measured on {self.measured_modules} modules on {self.device}"
        return f"{least}{duration(self.merge)} to merge ({how})"


@dataclass(frozen=True)
class Slots:
    """What the server needs: `result` slots for this name, `file` for everything in the file at once."""

    result: int
    file: int
    max_lora_rank: int | None

    def in_words(self) -> str:
        ranks = (
            f"--max-lora-rank {self.max_lora_rank}"
            if self.max_lora_rank is not None
            else f"its rank may be above {ACCEPTED_RANKS[-1]}, the highest that vLLM takes"
        )
        return f"1 of --max-loras; {self.file} to hold everything in the file at once; {ranks}"


@dataclass(frozen=True)
class Outlook:
    """rank and bytes: of the result, where they are known before; else None, and the bounds count.

    peak_bytes: of the adapters, the result and what the merge holds beside; None where that cannot be forecast.
    """

    rank_bound: int
    bytes_bound: int
    modules: int
    stage_rank_bounds: dict[str, int]
    rank: int | None
    bytes: int | None
    peak_bytes: int | None
    energy: Energy
    seconds: Seconds
    slots: Slots
    norms: dict[str, float]
    cosines: dict[str, float]
    warnings: list[str]


def outlook(prepared: Planned, device: str, bar: ProgressBar) -> Outlook:
    """Look at the adapters of a plan and merge a sample of their modules on `device`."""
    plan, catalogue = prepared.plan, prepared.catalogue
    shapes = {name: catalogue.get(name).shapes for name in plan.adapters}
    bounds = stage_bounds(plan, shapes)
    last = bounds[plan.name]
    started = time.perf_counter()
    adapters = dict(zip(plan.adapters, read_each(read_planned, plan.adapters.values()), strict=True))
    read = time.perf_counter() - started
    overlap = Overlap(list(adapters.values()), lambda done, total: bar.update("Comparing the adapters", done, total))
    ranks = {name: {module: rank for module, (*_, rank) in mine.items()} for name, mine in shapes.items()}
    kept = kept_by_rank(plan, overlap, ranks) if plan.stages else None
    sampled = kept is None and _may_cut(plan, shapes)
    on = cost_on(device) if plan.stages else None
    cost = plan_cost(plan, shapes, on) if on is not None else None
    sample = Sample()
    if plan.stages and (cost is None or sampled):
        bar.update("Merging a sample")
        sample = measure(plan, adapters, device, energy=sampled)
    seconds = Seconds(read, sample.seconds, sample.complete, sample.modules, device)
    if cost is not None:
        seconds = Seconds(read, cost.seconds, True, sample.modules, device, cost.device)
    rank, size, energy = _result(plan, shapes, kept, sample)
    inputs = sum(adapter.nbytes for adapter in adapters.values())
    result = size if size is not None else last.bytes
    names = len(prepared.file.recipes) + len(prepared.file.adapters)
    needed = rank if rank is not None else last.rank
    products = overlap.products()
    norms = products.diagonal().sqrt()
    pairs = [(i, j) for i, j in combinations(range(len(overlap.names)), 2) if norms[i] > 0 and norms[j] > 0]
    return Outlook(
        rank_bound=last.rank,
        bytes_bound=last.bytes,
        modules=last.modules,
        stage_rank_bounds={stage: bound.rank for stage, bound in bounds.items()} if plan.stages else {},
        rank=rank if plan.stages else last.rank,
        bytes=size if plan.stages else last.bytes,
        peak_bytes=None if cost is None else inputs + result + cost.workspace,
        energy=energy,
        seconds=seconds,
        slots=Slots(1, names, accepted_rank(needed)),
        norms=dict(zip(overlap.names, norms.tolist(), strict=True)),
        cosines={
            f"{overlap.names[i]}, {overlap.names[j]}": float(products[i, j] / (norms[i] * norms[j])) for i, j in pairs
        },
        warnings=prepared.warnings + _rank_warnings(plan, shapes, rank, energy) + cautions(plan, overlap, shapes),
    )


Shapes: TypeAlias = Mapping[str, Mapping[str, tuple[int, int, int]]]


def _result(plan: Plan, shapes: Shapes, kept: Kept | None, sample: Sample) -> tuple[int | None, int | None, Energy]:
    """Rank and bytes of the result, where they are known, and what is known of the energy."""
    if kept is not None:
        sizes = {module: d_out + d_in for mine in shapes.values() for module, (d_out, d_in, _) in mine.items()}
        size = sum(sizes[module] * rank for module, rank in kept.ranks.items()) * BYTES[plan.dtype]
        module = min(kept.energy, key=kept.energy.__getitem__)
        known: Literal["all", "exact"] = "all" if kept.energy[module] > 1 - 1e-9 else "exact"
        return max(kept.ranks.values()), size, Energy(known, kept.overall, kept.energy[module], module)
    if not _may_cut(plan, shapes):
        return None, None, Energy("all", 1.0, 1.0)
    rank = plan.stages[-1].rank
    if isinstance(rank, EnergyRank) and plan.max_rank is None:
        return None, None, Energy("asked", rank.energy, rank.energy)
    shares = {module: 1.0 if share is None else share for module, share in sample.energy.items()}
    if not shares:
        return None, None, Energy("no")
    module = min(shares, key=shares.__getitem__)
    return None, None, Energy("sample", None, shares[module], module)


def _may_cut(plan: Plan, shapes: Shapes) -> bool:
    """Whether the rank of the result may be less than what the merge makes."""
    return bool(plan.stages) and _uncut_rank(plan, shapes) > stage_bounds(plan, shapes)[plan.name].rank


def _uncut_rank(plan: Plan, shapes: Shapes) -> int:
    """The rank that the result may have before the last stage's rank cuts it."""
    stages = (*plan.stages[:-1], plan.stages[-1].model_copy(update={"rank": "lossless"}))
    return stage_bounds(plan.model_copy(update={"stages": stages}), shapes)[plan.name].rank


def _rank_warnings(plan: Plan, shapes: Shapes, rank: int | None, energy: Energy) -> list[str]:
    if not plan.stages:
        return []
    bound = stage_bounds(plan, shapes)[plan.name].rank
    highest = bound if rank is None else rank
    if plan.max_rank is not None and highest > plan.max_rank:
        has = "has" if rank is not None else "may have"
        return [f"the result {has} rank {highest}, and a server with --max-lora-rank {plan.max_rank} refuses it"]
    if energy.known != "all" and not isinstance(plan.stages[-1].rank, EnergyRank):
        uncut = _uncut_rank(plan, shapes)
        return [f"the result may have rank up to {uncut} and is cut to {bound}; `energy` says what that loses"]
    return []
