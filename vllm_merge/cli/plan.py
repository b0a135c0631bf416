# SPDX-License-Identifier: Apache-2.0
"""vllm-merge plan: what a recipe would make, without making it."""

from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_merge.cli.output import add_row, console, print_json, print_text, print_warnings, progress_bar, size, table
from vllm_merge.recipe.bounds import Bound, stage_bounds
from vllm_merge.recipe.plan import AdapterSource, Dtype, EnergyRank, Plan, Stage


def plan(
    recipe_file: Annotated[Path, typer.Argument(help="The recipe file.", show_default=False)],
    name: Annotated[
        str | None, typer.Argument(help="The recipe, alias or adapter; not needed where the file has one recipe.")
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of the result.")] = "float32",
    max_rank: Annotated[
        int | None, typer.Option(min=1, help="The highest LoRA rank of the server; what `rank: auto` means.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the facts as JSON.")] = False,
) -> None:
    """Show what a recipe would make: digest, stages, the highest possible rank, and bytes. Nothing is merged.

    \b
    Examples:
      vllm-merge plan recipe.yaml
      vllm-merge plan recipe.yaml support --max-rank 64 --dtype bfloat16 --json
    """
    from vllm_merge.cli.files import planned

    with progress_bar("Reading the recipe") as bar:
        prepared = planned(recipe_file, name, dtype, max_rank, bar)
    found = prepared.plan
    bounds = stage_bounds(found, {adapter: prepared.catalogue.get(adapter).shapes for adapter in found.adapters})
    last = bounds[found.name]
    warnings = prepared.warnings + _size_warnings(found, last)
    if json:
        print_json(
            {
                "artifact": found.artifact_name,
                "rank_bound": last.rank,
                "modules": last.modules,
                "bytes_bound": last.bytes,
                "stage_rank_bounds": {stage: bound.rank for stage, bound in bounds.items()},
                "adapters": {a: prepared.catalogue.get(a).summary.to_dict() for a in found.adapters},
                "warnings": warnings,
                "plan": found.model_dump(mode="json"),
            }
        )
        return
    print_warnings(warnings)
    print_text(found.artifact_name, style="bold")
    print_text(f"digest {found.digest}")
    print_text(f"at most rank {last.rank}, {size(last.bytes)} in {found.dtype}, {last.modules} modules")
    _print_stages(found, bounds)
    _print_adapters(found, {a: prepared.catalogue.get(a).summary.to_dict() for a in found.adapters})


def _print_stages(plan: Plan, bounds: dict[str, Bound]) -> None:
    rows = table("stage", "method", "space", "rank", "rank at most", "inputs")
    for stage in plan.stages:
        inputs = ", ".join(
            i.source.adapter if isinstance(i.source, AdapterSource) else i.source.stage for i in stage.inputs
        )
        add_row(rows, stage.name, stage.merge_method, stage.space, _rank(stage), bounds[stage.name].rank, inputs)
    if plan.stages:
        console().print(rows)


def _print_adapters(plan: Plan, summaries: dict[str, dict[str, Any]]) -> None:
    rows = table("adapter", "modules", "ranks", "size", "content hash")
    for name, planned in plan.adapters.items():
        summary = summaries[name]
        ranks = ", ".join(str(rank) for rank in summary["ranks"])
        add_row(rows, name, summary["modules"], ranks, size(summary["size_bytes"]), planned.content_hash[:12])
    console().print(rows)


def _rank(stage: Stage) -> str:
    return f"energy {stage.rank.energy:g}" if isinstance(stage.rank, EnergyRank) else str(stage.rank)


def _size_warnings(plan: Plan, bound: Bound) -> list[str]:
    if plan.max_rank is not None and bound.rank > plan.max_rank:
        return [f"the result may have rank {bound.rank}, above the maximum LoRA rank {plan.max_rank}, which refuses it"]
    return []
