# SPDX-License-Identifier: Apache-2.0
"""The files that `--plots` and `--html` ask for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from vllm_merge.errors import UserInputError


def write_plots(figures: Callable[[], Iterable[tuple[str, Any]]], folder: Path | None) -> list[Path]:
    """Every figure, by name, as PNG and SVG, in a folder that is made where it is missing."""
    if folder is None:
        return []
    from vllm_merge.report.plots import rendered

    if folder.exists() and not folder.is_dir():
        raise UserInputError(f"--plots {folder}: is not a folder; choose another")
    written = []
    for name, figure in figures():
        folder.mkdir(parents=True, exist_ok=True)
        for kind in ("png", "svg"):
            path = folder / f"{name}.{kind}"
            path.write_bytes(rendered(figure, kind))
            written.append(path)
    return written


def write_page(page: Callable[[], str], path: Path | None) -> list[Path]:
    """The page, whole or not at all."""
    if path is None:
        return []
    if path.is_dir():
        raise UserInputError(f"--html {path}: is a folder; give the name of a file")
    text = page()
    beside = path.with_name(f".{path.name}.part")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)
    return [path]
