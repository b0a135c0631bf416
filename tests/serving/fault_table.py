# SPDX-License-Identifier: Apache-2.0
"""The table in docs/architecture/faults.md: what each fault does, as it was seen when the fault was last injected.

A test that injects a fault hands its observations to `seen`. They must be what the page says; with the environment variable
VLLM_MERGE_WRITE_FAULTS set, the page is made to say them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "architecture" / "faults.md"
WRITE_VARIABLE = "VLLM_MERGE_WRITE_FAULTS"
COLUMNS = ("fault", "tried on", "requests that meet it", "left behind", "the next requests")


def documented() -> dict[str, tuple[str, ...]]:
    """{fault: the other cells of its row}."""
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    cells = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in rows]
    return {row[0]: row[1:] for row in cells if len(row) == len(COLUMNS) and row != COLUMNS and set(row[0]) != {"-"}}


def seen(fault: str, *cells: str) -> None:
    """The observations of one fault, in the order of COLUMNS; fails if the page says something else."""
    assert len(cells) == len(COLUMNS) - 1
    assert not any("|" in cell or "\n" in cell for cell in cells)
    rows = documented()
    if os.environ.get(WRITE_VARIABLE):
        _write({**rows, fault: cells})
        return
    assert rows.get(fault) == cells, f"{PAGE.name} says something else; run the test with {WRITE_VARIABLE}=1"


def plain(message: str) -> str:
    """A message without what differs from run to run: digests, folders, numbers of processes."""
    message = re.sub(r"(/[\w.-]+)+/", "…/", message)
    message = re.sub(r"worker-\d+(-[0-9a-f]+)?\.sock", "worker….sock", message)
    message = re.sub(r"@[0-9a-f]{12}", "", message)
    return re.sub(r"\b(?=[a-f]*\d)[0-9a-f]{12}\b", "…", message)


def _write(rows: dict[str, tuple[str, ...]]) -> None:
    text = PAGE.read_text(encoding="utf-8")
    head, _, rest = text.partition(_line(COLUMNS))
    tail = "\n".join(line for line in rest.splitlines() if not line.startswith("|"))
    table = [_line(COLUMNS), _line("---" for _ in COLUMNS), *(_line((fault, *cells)) for fault, cells in rows.items())]
    PAGE.write_text(head + "\n".join(table) + "\n" + tail.rstrip("\n").removeprefix("\n") + "\n", encoding="utf-8")


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"
