# SPDX-License-Identifier: Apache-2.0
"""The rank and energy that a plan's result will have, where they can be known without running it.

A weighted sum has the spectrum of its stacked factors, so that its ranks and energies are exact. For every other rule
they are known only where the rank is at least what the result can have: then nothing is cut off.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from vllm_merge.algebra.ranks import RankPolicy
from vllm_merge.forecast.overlap import Overlap
from vllm_merge.recipe.plan import AdapterSource, EnergyRank, Plan, Stage
from vllm_merge.recipe.resolve import evaluate, relative_depths

# {adapter: {module: coefficient}}
Coefficients = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, slots=True)
class Kept:
    """The rank of each module, and the share of ‖ΔW‖²_F that it keeps; `overall` is the share of the whole model."""

    ranks: Mapping[str, int]
    energy: Mapping[str, float]
    overall: float


def kept_by_rank(plan: Plan, overlap: Overlap, adapters: Mapping[str, Mapping[str, int]]) -> Kept | None:
    """The ranks and energies of the plan's result, or None where the rule is not a weighted sum.

    adapters: {adapter: {module: rank}}.
    """
    coefficients = linear_coefficients(plan, overlap, adapters)
    if coefficients is None:
        return None
    last = plan.stages[-1]
    policy = _policy(last, plan.max_rank)
    ranks, energy = {}, {}
    sums = totals = 0.0
    terms = _terms(plan, coefficients, adapters)
    for module, values in overlap.spectra(coefficients).items():
        total = values.sum()
        # A weighted sum has at most the summed ranks anyway, so that a limit by sum does not bind.
        rank = int(policy.choose(values[None], total[None], torch.tensor([len(values)]))[0])
        kept = values[:rank].sum()
        # Terms that fit the rank are put side by side, and none is worked out.
        beside = terms.get(module, 0)
        ranks[module] = beside if rank and last.space == "core" and _has_room(policy, beside) else rank
        energy[module] = float(kept / total) if total > 0 else 1.0
        sums, totals = sums + float(kept), totals + float(total)
    return Kept(ranks, energy, sums / totals if totals else 1.0)


def linear_coefficients(plan: Plan, overlap: Overlap, adapters: Mapping[str, Mapping[str, int]]) -> Coefficients | None:
    """What each adapter is multiplied with in a plan of weighted sums; None for any other plan."""
    squares = dict(zip(overlap.names, overlap.products().diagonal().tolist(), strict=True))
    stages: dict[str, dict[str, dict[str, float]]] = {}
    for stage in plan.stages:
        if not _is_linear(stage):
            return None
        inputs = []
        for item in stage.inputs:
            if isinstance(item.source, AdapterSource):
                name = item.source.adapter
                # Adapters that are zero everywhere are left out of the merge, and so of its mean.
                if squares[name] > 0:
                    inputs.append(({name: dict.fromkeys(adapters[name], 1.0)}, item.parameters))
            else:
                inputs.append((stages[item.source.stage], item.parameters))
        everything = sorted({m for terms, _ in inputs for mine in terms.values() for m in mine})
        depths = relative_depths(everything)
        factor = _at(stage.parameters["lambda"], everything, depths)
        weights = [_at(parameters["weight"], everything, depths) for _, parameters in inputs]
        sums = {m: sum(weight[m] for weight in weights) for m in everything}
        mean = stage.merge_method == "linear" and stage.parameters["normalize"]
        if mean and any(total == 0 for total in sums.values()):
            return None
        result: dict[str, dict[str, float]] = {}
        for (terms, _), weight in zip(inputs, weights, strict=True):
            for name, mine in terms.items():
                into = result.setdefault(name, {})
                for module, coefficient in mine.items():
                    share = weight[module] / sums[module] if mean else weight[module]
                    into[module] = into.get(module, 0.0) + coefficient * share * factor[module]
        if stage is not plan.stages[-1] and _cuts(stage, result, adapters):
            return None
        stages[stage.name] = result
    return stages[plan.stages[-1].name] if plan.stages else None


def _terms(plan: Plan, coefficients: Coefficients, adapters: Mapping[str, Mapping[str, int]]) -> Mapping[str, int]:
    """How many rank-one terms each module has in the last stage, where an adapter counts once in every stage it is put in."""
    if len(plan.stages) == 1:
        used = [(name, coefficients[name]) for name in coefficients]
    else:
        used = [(name, mine) for stage in plan.stages for name, mine in coefficients.items() if _is_put_in(stage, name)]
    found: dict[str, int] = {}
    for name, mine in used:
        for module, coefficient in mine.items():
            if coefficient != 0:
                found[module] = found.get(module, 0) + adapters[name].get(module, 0)
    return found


def _is_put_in(stage: Stage, adapter: str) -> bool:
    return any(isinstance(item.source, AdapterSource) and item.source.adapter == adapter for item in stage.inputs)


def _has_room(policy: RankPolicy, terms: int) -> bool:
    return policy.energy is None and (policy.by_sum or (policy.limit or 0) >= terms)


def _cuts(stage: Stage, terms: Coefficients, adapters: Mapping[str, Mapping[str, int]]) -> bool:
    """Whether the rank of a stage can be less than what its sum has."""
    if stage.rank in ("auto", "lossless"):
        return False
    sums: dict[str, int] = {}
    for name in terms:
        for module, rank in adapters[name].items():
            sums[module] = sums.get(module, 0) + rank
    return not isinstance(stage.rank, int) or max(sums.values(), default=0) > stage.rank


def _is_linear(stage: Stage) -> bool:
    if stage.precondition:
        return False
    if stage.merge_method == "linear" and stage.space == "knots":
        return not stage.parameters["normalize"]  # the mean is then over the entries that are not zero
    return stage.merge_method in ("linear", "task_arithmetic")


def _at(value: object, modules: list[str], depths: Mapping[str, float]) -> Mapping[str, float]:
    found = evaluate(value, modules, depths)
    return found if isinstance(found, dict) else dict.fromkeys(modules, found)


def _policy(stage: Stage, max_rank: int | None) -> RankPolicy:
    rank = {"energy": stage.rank.energy} if isinstance(stage.rank, EnergyRank) else stage.rank
    return RankPolicy.parse(rank, max_rank)
