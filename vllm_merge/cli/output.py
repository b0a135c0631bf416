# SPDX-License-Identifier: Apache-2.0
"""What the commands print: facts on stdout, everything else on stderr; colours and bars on terminals only."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

WIDTH_OF_FILES = 160


def console(*, stderr: bool = False) -> Console:
    """A console for one of the two streams; wide and without colours where it is not a terminal."""
    from rich.console import Console

    found = Console(stderr=stderr, highlight=False)
    return found if found.is_terminal else Console(stderr=stderr, highlight=False, width=WIDTH_OF_FILES, no_color=True)


def print_json(value: Any) -> None:
    """`value` as JSON on stdout."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def print_text(text: str, style: str = "") -> None:
    """A line on stdout, never wrapped or interpreted."""
    from rich.text import Text

    console().print(Text(text, style=style), soft_wrap=True)


def print_error(message: str) -> None:
    """A failure, on stderr."""
    from rich.text import Text

    console(stderr=True).print(Text.assemble(("Error: ", "bold red"), message), soft_wrap=True)


def print_warnings(warnings: Sequence[str]) -> None:
    """Warnings, on stderr."""
    from rich.text import Text

    for warning in warnings:
        console(stderr=True).print(Text.assemble(("Warning: ", "bold yellow"), warning), soft_wrap=True)


def table(*columns: str, title: str | None = None) -> Table:
    """A table whose cells are printed as they are."""
    from rich.table import Table
    from rich.text import Text

    made = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        made.add_column(Text(column), overflow="fold")
    return made


def add_row(to: Table, *cells: object, style: str = "") -> None:
    """A row of plain text cells; `style` is that of the first one."""
    from rich.text import Text

    to.add_row(*(Text(str(cell), style=style if index == 0 else "") for index, cell in enumerate(cells)))


def print_table(rows: Table) -> None:
    """The table on stdout, without the spaces that fill its lines."""
    target = console()
    with target.capture() as capture:
        target.print(rows)
    for line in capture.get().splitlines():
        typer.echo(line.rstrip())


@contextmanager
def progress_bar(title: str) -> Iterator[ProgressBar]:
    """A bar on stderr while the block runs; it is gone afterwards, and absent where stderr is not a terminal."""
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    target = console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=target, transient=True, disable=not target.is_terminal) as progress:
        yield ProgressBar(progress, title)


class ProgressBar:
    """One bar, without an end until it is told one."""

    def __init__(self, progress: Progress, title: str) -> None:
        self._progress = progress
        self._task = progress.add_task(title, total=None)

    def update(self, title: str, done: int = 0, total: int | None = None) -> None:
        """`done` of `total` steps of what `title` says; without a total, the bar only moves."""
        self._progress.update(self._task, description=title, completed=done, total=total)


def size(count: int) -> str:
    """Bytes for people: 1.5 MB."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def duration(seconds: float) -> str:
    """Seconds for people: 0.02 s, 1.5 s, 90 s."""
    return f"{seconds:.2g} s" if seconds < 1 else f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
