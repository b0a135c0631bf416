# SPDX-License-Identifier: Apache-2.0
"""vllm-merge merge: run a recipe offline and write the result as a PEFT folder."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_merge.cli.completion import recipe_names
from vllm_merge.cli.output import print_json, print_text, print_warnings, progress_bar, size
from vllm_merge.errors import MergeError, UserInputError
from vllm_merge.recipe.dtypes import Dtype

if TYPE_CHECKING:
    from vllm_merge.artifact import MergedAdapter
    from vllm_merge.recipe.plan import Plan


def merge(
    recipe_file: Annotated[Path, typer.Argument(help="The recipe file.", metavar="RECIPE_FILE", show_default=False)],
    name: Annotated[
        str | None,
        typer.Argument(
            help="The recipe, alias or adapter; not needed where the file has one recipe.",
            metavar="NAME",
            autocompletion=recipe_names,
        ),
    ] = None,
    *,
    output: Annotated[
        Path,
        typer.Option(
            "-o", "--output", help="The folder to write: new, empty, or an earlier result.", show_default=False
        ),
    ],
    device: Annotated[str, typer.Option(help="Where to merge: cpu, cuda, cuda:1, …")] = "cpu",
    dtype: Annotated[Dtype, typer.Option(help="Of the result.")] = "float32",
    max_rank: Annotated[
        int | None, typer.Option(min=1, help="The highest LoRA rank of the server; what `rank: auto` means.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the facts as JSON.")] = False,
) -> None:
    """Merge by a recipe and write the result as a PEFT folder, which vLLM and PEFT load.

    \b
    Examples:
      vllm-merge merge recipe.yaml -o merged
      vllm-merge merge recipe.yaml support -o merged --device cuda --dtype bfloat16 --max-rank 64
    """
    import torch

    from vllm_merge.cli.device import checked_device
    from vllm_merge.cli.files import planned
    from vllm_merge.plan_runner import run_plan

    _check_output(output)
    target = checked_device(device)
    with progress_bar("Reading the recipe") as bar:
        prepared = planned(recipe_file, name, dtype, max_rank, bar)
        with torch.inference_mode():
            try:
                merged = run_plan(
                    prepared.plan,
                    device=target,
                    progress=lambda stage, done, total: bar.update(
                        f"Merging {prepared.plan.name}: {stage}", done, total
                    ),
                )
            except torch.OutOfMemoryError as error:
                reason = str(error).partition(". ")[0]
                raise MergeError(f"--device {device}: {reason}; merge on another device, such as cpu") from None
        merged.base_model = merged.base_model or prepared.file.base_model
        _write(merged, output)
    warnings = prepared.warnings + merged.report.warnings
    facts = _facts(prepared.plan, merged, output, warnings)
    if json:
        print_json(facts)
        return
    print_warnings(warnings)
    print_text(f"{facts['artifact']} → {output}", style="bold")
    kept = facts["least_energy_kept"]
    truncated = "nothing cut off" if kept is None else f"at least {kept:.2%} of each module's energy kept"
    print_text(f"{facts['modules']} modules, rank {facts['rank']}, {size(facts['bytes'])}, {truncated}")


def _check_output(output: Path) -> None:
    """Refuse a folder that something else is in, before any work is done."""
    from vllm_merge.adapters.peft import CONFIG_FILE, WEIGHTS_FILE
    from vllm_merge.adapters.sequence_state import REPORT_FILE
    from vllm_merge.artifact import RECIPE_FILE

    if not output.exists():
        return
    if not output.is_dir():
        raise UserInputError(f"{output}: is not a folder; choose another --output")
    found = {entry.name for entry in output.iterdir()}
    ours = {CONFIG_FILE, WEIGHTS_FILE, RECIPE_FILE, REPORT_FILE}
    if found and found != ours:
        others = ", ".join(sorted(found - ours)[:3]) or "parts of a result"
        raise UserInputError(
            f"{output}: is neither empty nor a result of vllm-merge (it has {others}); choose another --output"
        )


def _write(merged: MergedAdapter, output: Path) -> None:
    """Write to a folder beside, then put it in the place of an earlier result, if there is one."""
    if not output.exists() or not any(output.iterdir()):
        merged.save_pretrained(output)
        return
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.absolute().parent) as beside:
        merged.save_pretrained(Path(beside) / "new")
        output.rename(Path(beside) / "old")
        (Path(beside) / "new").rename(output)
        shutil.rmtree(Path(beside) / "old")


def _facts(plan: Plan, merged: MergedAdapter, output: Path, warnings: list[str]) -> dict[str, Any]:
    report = merged.report
    kept = [share for share in report.energy_kept.values() if share is not None]
    return {
        "name": plan.name,
        "artifact": plan.artifact_name,
        "digest": plan.digest,
        "tensors_sha256": merged.tensors_sha256,
        "path": str(output.absolute()),
        "dtype": plan.dtype,
        "modules": len(merged.factors),
        "rank": merged.rank,
        "bytes": merged.nbytes,
        "least_energy_kept": min(kept) if kept else None,
        "seconds": report.seconds,
        "warnings": warnings,
    }
