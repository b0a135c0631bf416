# SPDX-License-Identifier: Apache-2.0
"""vllm-merge plan: what a recipe would make and what it would cost, without making it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_merge.cli.completion import recipe_names
from vllm_merge.cli.output import (
    add_row,
    duration,
    print_json,
    print_table,
    print_text,
    print_warnings,
    progress_bar,
    size,
    table,
)
from vllm_merge.errors import UserInputError
from vllm_merge.recipe.dtypes import Dtype

if TYPE_CHECKING:
    from vllm_merge.cli.outlook import Outlook
    from vllm_merge.recipe.plan import Plan, Stage


def plan(
    recipe_file: Annotated[Path, typer.Argument(help="The recipe file.", metavar="RECIPE_FILE", show_default=False)],
    name: Annotated[
        str | None,
        typer.Argument(
            help="The recipe, alias or adapter; not needed where the file has one recipe.",
            metavar="NAME",
            autocompletion=recipe_names,
        ),
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Of the result: float32; with --server, the model's.", show_default=False)
    ] = None,
    max_rank: Annotated[
        int | None, typer.Option(min=1, help="The highest LoRA rank of the server; what `rank: auto` means.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where it would be merged: cpu, cuda, cuda:1, …")] = "cpu",
    server: Annotated[
        bool,
        typer.Option("--server", help="Plan a server for the whole file instead: memory by use, and whether it fits."),
    ] = False,
    model: Annotated[
        str | None, typer.Option(help="--server: the base model's folder or config.json, if not the file's.")
    ] = None,
    max_loras: Annotated[int | None, typer.Option(min=1, help="--server: slots, as of vLLM.", show_default="4")] = None,
    tensor_parallel_size: Annotated[int, typer.Option(min=1, help="--server: GPUs that share each layer.")] = 1,
    pipeline_parallel_size: Annotated[int, typer.Option(min=1, help="--server: GPUs that share the layers.")] = 1,
    gpu_memory: Annotated[str | None, typer.Option(help="--server: of one GPU, such as 80GiB.")] = None,
    gpu_memory_utilization: Annotated[
        float, typer.Option(min=0.01, max=1, help="--server: the share that vLLM may use.")
    ] = 0.9,
    other: Annotated[str, typer.Option(help="--server: what vLLM itself takes (activations, graphs).")] = "2GiB",
    max_model_len: Annotated[
        int | None, typer.Option(min=1, help="--server: the longest sequence.", show_default="the model's")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the facts as JSON.")] = False,
) -> None:
    """Show what a recipe would make and cost: rank, energy kept, bytes, seconds, slots, and what to be careful about.

    Nothing is written. The adapters are read; their overlap gives the exact energy of weighted sums. Seconds and memory are
    forecast from measured merges, or a few modules are merged to see how long it takes.

    \b
    Examples:
      vllm-merge plan recipe.yaml
      vllm-merge plan recipe.yaml support --max-rank 64 --dtype bfloat16 --json
      vllm-merge plan recipe.yaml --server --gpu-memory 80GiB --max-loras 8 --max-rank 64
    """
    if server:
        from vllm_merge.cli.plan_server import ServerOptions, plan_server

        if name is not None:
            raise UserInputError("--server plans for the whole file; leave NAME out")
        options = ServerOptions(
            model=model,
            dtype=dtype,
            max_loras=max_loras,
            max_rank=max_rank,
            tensor=tensor_parallel_size,
            pipeline=pipeline_parallel_size,
            gpu_memory=gpu_memory,
            utilization=gpu_memory_utilization,
            other=other,
            max_length=max_model_len,
        )
        plan_server(recipe_file, options, json)
        return
    from vllm_merge.cli.device import checked_device
    from vllm_merge.cli.files import planned
    from vllm_merge.cli.outlook import outlook

    target = checked_device(device)
    with progress_bar("Reading the recipe") as bar:
        prepared = planned(recipe_file, name, dtype or "float32", max_rank, bar)
        found = outlook(prepared, target, bar)
    if json:
        summaries = {a: prepared.catalogue.get(a).summary.to_dict() for a in prepared.plan.adapters}
        print_json(_facts(prepared.plan, found, summaries))
        return
    print_warnings(found.warnings)
    print_text(prepared.plan.artifact_name, style="bold")
    print_text(f"digest {prepared.plan.digest}")
    _print_outlook(prepared.plan, found)
    _print_stages(prepared.plan, found)
    rows = table("adapter", "modules", "ranks", "size", "norm", "content hash")
    for adapter, identity in prepared.plan.adapters.items():
        summary = prepared.catalogue.get(adapter).summary
        ranks = ", ".join(str(rank) for rank in summary.ranks)
        norm = f"{found.norms[adapter]:.4g}"
        add_row(rows, adapter, summary.modules, ranks, size(summary.size_bytes), norm, identity.content_hash[:12])
    print_table(rows)


def _facts(plan: Plan, found: Outlook, summaries: dict[str, dict[str, object]]) -> dict[str, Any]:
    return {
        "artifact": plan.artifact_name,
        "rank_bound": found.rank_bound,
        "modules": found.modules,
        "bytes_bound": found.bytes_bound,
        "stage_rank_bounds": found.stage_rank_bounds,
        "rank": found.rank,
        "bytes": found.bytes,
        "peak_bytes": found.peak_bytes,
        "energy": asdict(found.energy),
        "seconds": asdict(found.seconds),
        "slots": asdict(found.slots),
        "adapters": {name: {**summary, "norm": found.norms[name]} for name, summary in summaries.items()},
        "cosines": found.cosines,
        "warnings": found.warnings,
        "plan": plan.model_dump(mode="json"),
    }


def _print_outlook(plan: Plan, found: Outlook) -> None:
    rows = table("", "")
    rows.show_header = False
    if found.rank is None:
        add_row(rows, "rank", f"at most {found.rank_bound}, {found.modules} modules")
        add_row(rows, "size", f"at most {size(found.bytes_bound)} in {plan.dtype}")
    else:
        add_row(rows, "rank", f"{found.rank}, {found.modules} modules")
        add_row(rows, "size", f"{size(found.bytes or 0)} in {plan.dtype}")
    add_row(rows, "energy", found.energy.in_words())
    if plan.stages:
        add_row(rows, "seconds", found.seconds.in_words())
        add_row(rows, "", f"{duration(found.seconds.read)} to read the adapters, as just now")
    if found.peak_bytes is not None:
        add_row(rows, "memory", f"about {size(found.peak_bytes)} while merging, adapters and result included")
    add_row(rows, "slots", found.slots.in_words())
    print_table(rows)


def _print_stages(plan: Plan, found: Outlook) -> None:
    rows = table("stage", "method", "space", "rank", "rank at most", "inputs")
    for stage in plan.stages:
        inputs = ", ".join(next(iter(item.source.model_dump().values())) for item in stage.inputs)
        bound = found.stage_rank_bounds[stage.name]
        add_row(rows, stage.name, stage.merge_method, stage.space, _rank(stage), bound, inputs)
    if plan.stages:
        print_table(rows)


def _rank(stage: Stage) -> str:
    energy = getattr(stage.rank, "energy", None)
    return str(stage.rank) if energy is None else f"energy {energy:g}"
