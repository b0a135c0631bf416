# SPDX-License-Identifier: Apache-2.0
"""vllm-merge inspect: what is in an adapter folder or in the result of a merge."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_merge.cli.output import (
    add_row,
    print_json,
    print_table,
    print_text,
    print_warnings,
    progress_bar,
    size,
    table,
)

if TYPE_CHECKING:
    from vllm_merge.adapters.factors import Adapter, LoraFactors


def inspect(
    folder: Annotated[
        Path, typer.Argument(help="A PEFT folder, or one that `merge` wrote.", metavar="FOLDER", show_default=False)
    ],
    json: Annotated[bool, typer.Option("--json", help="Print the facts as JSON.")] = False,
) -> None:
    """Show what an adapter holds: modules, ranks, scalings, norms of the weight changes, bytes; and a merge's report.

    \b
    Examples:
      vllm-merge inspect adapters/sql
      vllm-merge inspect merged --json
    """
    from vllm_merge.adapters.peft import read_adapter
    from vllm_merge.artifact import RECIPE_FILE, MergedAdapter

    with progress_bar(f"Reading {folder}") as bar:
        adapter = read_adapter(folder)
        modules = {}
        for index, (module, factors) in enumerate(adapter.factors.items()):
            bar.update("Norms", index, len(adapter.factors))
            modules[module] = _module(factors)
    merged = MergedAdapter.from_pretrained(folder) if (folder / RECIPE_FILE).is_file() else None
    facts = _facts(adapter, modules)
    if merged is not None:
        facts |= {"report": merged.report.to_dict(), "provenance": merged.provenance}
    if json:
        print_json(facts)
        return
    print_warnings(facts["warnings"])
    print_text(adapter.name, style="bold")
    print_text(f"content hash {facts['content_hash']}")
    print_text(f"base model {facts['base_model'] or 'not named'}")
    print_text(f"{len(modules)} modules, rank {facts['rank']}, {size(facts['bytes'])}, norm {facts['norm']:.4g}")
    rows = table("module", "d_out", "d_in", "rank", "scaling", "norm", *(["energy kept"] if merged else []))
    for module, row in modules.items():
        cells = [row["d_out"], row["d_in"], row["rank"], f"{row['scaling']:g}", f"{row['norm']:.4g}"]
        if merged is not None:
            share = merged.report.energy_kept.get(module)
            cells.append("all" if share is None else f"{share:.2%}")
        add_row(rows, module, *cells)
    print_table(rows)
    if merged is not None:
        print_text(f"merged as {merged.provenance.get('artifact', merged.name)}, method {merged.report.method}")
        print_warnings(merged.report.warnings)


def _module(factors: "LoraFactors") -> dict[str, Any]:
    """Sizes, and ‖ΔW‖_F = s · √trace(BᵀB · AAᵀ), which needs no dense ΔW."""
    a, b = factors.A.double(), factors.B.double()
    energy = float(((b.mT @ b) * (a @ a.mT)).sum())
    d_out, d_in = factors.shape
    return {
        "d_out": d_out,
        "d_in": d_in,
        "rank": factors.rank,
        "scaling": factors.scaling,
        "norm": abs(factors.scaling) * max(energy, 0.0) ** 0.5,
        "dtype": str(factors.A.dtype).removeprefix("torch."),
    }


def _facts(adapter: "Adapter", modules: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {
        "name": adapter.name,
        "content_hash": adapter.content_hash,
        "base_model": adapter.base_model,
        "rank": adapter.rank,
        "bytes": adapter.nbytes,
        "norm": sum(row["norm"] ** 2 for row in modules.values()) ** 0.5,
        "warnings": list(adapter.metadata["warnings"]),  # type: ignore[call-overload]
        "modules": modules,
    }
