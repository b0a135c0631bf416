# SPDX-License-Identifier: Apache-2.0
"""The figures of an experiment: how the difference came about over time, and what every metric says."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from vllm_merge.report.plots import Theme, figure_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Facts = Mapping[str, Any]
_CLIP = 3.0  # how far beyond the last interval the vertical axis shows the wide ones of the beginning, in its widths


def experiment_figures(facts: Facts, theme: Theme) -> Iterator[tuple[str, Figure]]:
    """(name, figure) of everything there is to draw. facts: those of `vllm-merge experiment report --json`.

    Raises UserInputError, saying what to install, where matplotlib is not there.
    """
    with figure_style(theme):
        lines = [line for line in facts["course"] if any(low is not None for low in line["low"])]
        if lines:
            yield "course", _course(lines, facts["primary"], theme)
        rows = list(_lifts(facts))
        if rows:
            yield "metrics", _metrics(rows, theme)


def _course(lines: Sequence[Facts], primary: Facts, theme: Theme) -> Figure:
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 2.0 + 1.7 * len(lines)), layout="constrained")
    for index, (line, axes) in enumerate(zip(lines, figure.subplots(len(lines), 1, squeeze=False)[:, 0], strict=True)):
        color = theme.lines[index % len(theme.lines)]
        known = [i for i, low in enumerate(line["low"]) if low is not None and line["high"][i] is not None]
        at = [datetime.fromtimestamp(line["at"][i], UTC) for i in known]
        low, middle, high = ([line[name][i] for i in known] for name in ("low", "difference", "high"))
        axes.fill_between(at, low, high, color=color, alpha=0.22, linewidth=0)
        axes.plot(at, middle, color=color, lw=1.8, marker="o" if len(at) == 1 else "")
        axes.axhline(0, color=theme.text, lw=0.8)
        axes.set_title(f"{line['arm']} − {primary['control']}, {primary['metric']}")
        axes.set_ylim(*_window(low, high))
        axes.grid(axis="y", color=theme.faint, lw=0.6)
        locator = AutoDateLocator()
        axes.xaxis.set_major_locator(locator)
        axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))
    return figure


def _window(low: Sequence[float], high: Sequence[float]) -> tuple[float, float]:
    """From the last interval outwards, with 0 in it: the first ones are far wider than anything of interest."""
    width = (high[-1] - low[-1]) or 1.0
    bottom = max(min(*low, 0.0), min(low[-1], 0.0) - _CLIP * width)
    top = min(max(*high, 0.0), max(high[-1], 0.0) + _CLIP * width)
    return bottom - 0.05 * width, top + 0.05 * width


def _lifts(facts: Facts) -> Iterator[tuple[str, Facts]]:
    """(label, difference) of everything that can be said as a share of control."""
    for finding in [*([facts["primary"]] if facts["primary"] else []), *facts["metrics"]]:
        for difference in finding["differences"]:
            if difference["lift_low"] is not None and math.isfinite(difference["lift"] or math.nan):
                yield f"{finding['metric']}, {difference['arm']}", difference


def _metrics(rows: Sequence[tuple[str, Facts]], theme: Theme) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 1.2 + 0.28 * len(rows)), layout="constrained")
    axes: Axes = figure.subplots()
    for place, (_, row) in enumerate(rows):
        color = {"better": theme.lines[2], "worse": theme.lines[1]}.get(row["state"], theme.lines[0])
        ends = [100 * row["lift_low"], 100 * row["lift_high"]]
        axes.plot(ends, [place, place], color=color, lw=2.2, solid_capstyle="butt")
        axes.plot([100 * row["lift"]], [place], color=color, marker="o", ms=5)
    axes.axvline(0, color=theme.text, lw=0.8)
    axes.set_yticks(range(len(rows)), [label for label, _ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("% of control")
    axes.grid(axis="x", color=theme.faint, lw=0.6)
    return figure
