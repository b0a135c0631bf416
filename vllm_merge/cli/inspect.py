# SPDX-License-Identifier: Apache-2.0
"""vllm-merge inspect: what is in an adapter folder or in the result of a merge."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

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
from vllm_merge.cli.pictures import write_page, write_plots

if TYPE_CHECKING:
    from vllm_merge.adapters.factors import Adapter, LoraFactors
    from vllm_merge.artifact import MergeReport


def inspect(
    folder: Annotated[
        Path, typer.Argument(help="A PEFT folder, or one that `merge` wrote.", metavar="FOLDER", show_default=False)
    ],
    json: Annotated[bool, typer.Option("--json", help="Print the facts as JSON.")] = False,
    plots: Annotated[
        Path | None, typer.Option(help="Write the plots to this folder, as PNG and SVG.", metavar="DIR")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write one page with everything, which needs no other file.", metavar="FILE")
    ] = None,
) -> None:
    """Show what an adapter holds: modules, ranks, scalings, norms of the weight changes, bytes; and a merge's report:
    how the adapters lie to each other and to the result, effective ranks, sign conflict, energy kept. These are facts
    about weights: they do not foretell how much a task loses.

    \b
    Examples:
      vllm-merge inspect adapters/sql
      vllm-merge inspect merged --json
      vllm-merge inspect merged --plots plots --html merged.html
    """
    from vllm_merge.adapters.peft import read_adapter
    from vllm_merge.artifact import RECIPE_FILE, MergedAdapter
    from vllm_merge.report.page import module_rows

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
    written = [*write_plots(lambda: _figures(facts), plots), *write_page(lambda: _page(facts), html)]
    if json:
        print_json(facts)
        return
    print_warnings(facts["warnings"])
    print_text(adapter.name, style="bold")
    print_text(f"content hash {facts['content_hash']}")
    print_text(f"base model {facts['base_model'] or 'not named'}")
    print_text(f"{len(modules)} modules, rank {facts['rank']}, {size(facts['bytes'])}, norm {facts['norm']:.4g}")
    _print_rows(*module_rows(facts))
    if merged is not None:
        print_text(f"merged as {merged.provenance.get('artifact', merged.name)}, method {merged.report.method}")
        if merged.report.overall:
            _print_overall(merged.report)
        print_warnings(merged.report.warnings)
    for path in written:
        print_text(f"wrote {path}")


def _print_rows(head: list[str], rows: list[list[str]]) -> None:
    made = table(*head)
    for row in rows:
        add_row(made, *row)
    print_table(made)


def _print_overall(report: "MergeReport") -> None:
    from vllm_merge.report.page import adapter_rows

    _print_rows(*adapter_rows(report.to_dict()))
    found = report.overall
    parts = [f"energy kept {found['energy_kept']:.2%}"]
    if found["effective_rank"] is not None:
        parts.append(f"effective rank {found['effective_rank']:.1f}")
    if found["sign_conflict"] is not None:
        parts.append(f"sign conflict {found['sign_conflict']:.1%}")
    parts.append(f"{duration(sum(report.seconds.values()))}, at most {size(report.peak_workspace_bytes)} at once")
    print_text("; ".join(parts))


def _figures(facts: dict[str, Any]) -> Iterable[tuple[str, Any]]:
    from vllm_merge.report.plots import LIGHT, figures

    return figures(facts, LIGHT)


def _page(facts: dict[str, Any]) -> str:
    from vllm_merge.report.page import page

    return page(facts)


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
