# SPDX-License-Identifier: Apache-2.0
"""vllm-merge doctor: whether everything is in place to serve, and what to change first if not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vllm_merge.cli.output import add_row, print_json, print_table, print_text, progress_bar, table

if TYPE_CHECKING:
    from vllm_merge.cli.output import ProgressBar
    from vllm_merge.diagnosis import Check

STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red"}


def doctor(
    model: Annotated[
        str | None,
        typer.Argument(help="The base model that is to be served; otherwise the file's base_model.", metavar="MODEL"),
    ] = None,
    config: Annotated[Path | None, typer.Option("--config", help="The recipe file that is to be served.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the facts as JSON.")] = False,
) -> None:
    """Check Python, torch, vLLM, the plugin, environment variables, memory, a recipe file and its adapters.

    The last line is the one thing to change first. Exits with 1 if there is a problem; warnings are none.

    \b
    Examples:
      vllm-merge doctor
      vllm-merge doctor ./model --config recipes.yaml --json
    """
    with progress_bar("Looking at Python and torch") as bar:
        checks = list(_checks(model, config, bar))
    problems = [check for check in checks if check.state == "problem"]
    if json:
        first = problems[0].advice if problems else None
        print_json({"good": not problems, "change_first": first, "checks": [asdict(check) for check in checks]})
    else:
        _print(checks)
    if problems:
        raise typer.Exit(1)


def _checks(model: str | None, config: Path | None, bar: ProgressBar) -> Iterator[Check]:
    from vllm_merge import diagnosis
    from vllm_merge.serving import diagnosis as serving

    yield diagnosis.check_python()
    yield diagnosis.check_torch()
    bar.update("Importing vLLM")
    yield serving.check_vllm()
    yield serving.check_entry_points()
    yield from serving.check_environment()
    yield from diagnosis.check_memory()
    bar.update("Looking at the recipe file and its adapters")
    if config is not None:
        yield from diagnosis.check_config(config, model)
    elif model is not None:
        yield from diagnosis.check_base(model)


def _print(checks: list[Check]) -> None:
    rows = table("state", "what", "found")
    for check in checks:
        add_row(rows, check.state, check.name, check.found, style=STYLES[check.state])
    print_table(rows)
    wanting = sorted((check for check in checks if check.state != "ok"), key=lambda check: check.state == "warning")
    for check in wanting[1:]:
        print_text(f"{check.state}: {check.name}: {check.advice}")
    if not wanting:
        print_text("All good.", style="bold green")
        return
    first = wanting[0]
    title = "Change first" if first.state == "problem" else "All good. You may change"
    print_text(f"{title}: {first.name}: {first.advice}", style="bold")
