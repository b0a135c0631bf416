# SPDX-License-Identifier: Apache-2.0
"""How large a plan's result can be, from the shapes of its adapters alone."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from vllm_merge.recipe.dtypes import BYTES
from vllm_merge.recipe.plan import AdapterSource, EnergyRank, Plan, Stage

# Module -> (d_out, d_in, rank).
Shapes = Mapping[str, tuple[int, int, int]]

FULL_RANK_SPACES = frozenset({"delta"})


@dataclass(frozen=True)
class Bound:
    """The most that a stage's result can have. rank: the largest of its modules; bytes: of all factors."""

    rank: int
    bytes: int
    modules: int
    parameters: int


def stage_bounds(plan: Plan, adapters: Mapping[str, Shapes]) -> dict[str, Bound]:
    """The bound of each stage of `plan` by name, or of the adapter itself in a plan without stages."""
    if not plan.stages:
        return {plan.name: _bound(adapters[plan.name], plan.dtype)}
    last = plan.stages[-1].name
    return {
        stage.name: _bound(shapes, plan.dtype if stage.name == last else "float32")
        for stage, _, shapes in input_shapes(plan, adapters)
    }


def input_shapes(plan: Plan, adapters: Mapping[str, Shapes]) -> Iterator[tuple[Stage, list[Shapes], Shapes]]:
    """Each stage of `plan` with the shapes of its inputs, and those that its result has at most."""
    shapes: dict[str, Shapes] = {}
    for stage in plan.stages:
        inputs = [
            adapters[item.source.adapter] if isinstance(item.source, AdapterSource) else shapes[item.source.stage]
            for item in stage.inputs
        ]
        shapes[stage.name] = _merged(stage, inputs, plan.max_rank if stage is plan.stages[-1] else None)
        yield stage, inputs, shapes[stage.name]


def _merged(stage: Stage, inputs: list[Shapes], max_rank: int | None) -> Shapes:
    # Rules that merge A and B apart add the factors up, and the rank stays.
    stacked = stage.space != "factors" or stage.parameters.get("target_rank", "largest") != "largest"
    sums: dict[str, tuple[int, int, int]] = {}
    for shapes in inputs:
        for module, (d_out, d_in, rank) in shapes.items():
            before = sums.get(module, (0, 0, 0))[2]
            sums[module] = (d_out, d_in, before + rank if stacked else max(before, rank))
    return {
        module: (d_out, d_in, _rank(stage, min(d_out, d_in), total, max_rank))
        for module, (d_out, d_in, total) in sums.items()
    }


def _rank(stage: Stage, full: int, total: int, max_rank: int | None) -> int:
    exact = full if stage.space in FULL_RANK_SPACES else min(full, total)
    match stage.rank:
        case "lossless":
            return exact
        case "auto":
            return min(exact, total)
        case EnergyRank():
            return exact if max_rank is None else min(exact, max_rank)
        case limit:
            return min(exact, limit)


def _bound(shapes: Shapes, dtype: str) -> Bound:
    parameters = sum((d_out + d_in) * rank for d_out, d_in, rank in shapes.values())
    rank = max((rank for *_, rank in shapes.values()), default=0)
    return Bound(rank, parameters * BYTES[dtype], len(shapes), parameters)
