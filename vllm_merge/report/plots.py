# SPDX-License-Identifier: Apache-2.0
"""The figures of an adapter or a merge, by matplotlib, for light and dark pages."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

from vllm_merge.errors import UserInputError
from vllm_merge.report import facts as arranged

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_NUMBERS = 10  # columns up to which cells have their number in them
MOST_LABELS = 24
LONGEST_NAME = 18
MISSING = "matplotlib is not installed, and plots need it; install it with `pip install 'vllm-merge[plots]'`"


@dataclass(frozen=True, slots=True)
class Theme:
    """Colours: background, text, faint lines; of the result's line; from low to high, of signed and of other values."""

    back: str
    text: str
    faint: str
    result: str
    signed: Sequence[str]
    plain: Sequence[str]
    lines: Sequence[str]


LIGHT = Theme(
    "#ffffff",
    "#1f2328",
    "#d8dee4",
    "#1f2328",
    ("#1f5fa8", "#9cc3ea", "#f6f7f8", "#f0a98f", "#b5391f"),
    ("#f3f7fc", "#9cc3ea", "#2a6fbb", "#0f3a6b"),
    ("#2a6fbb", "#d1632b", "#2f8f5b", "#8a4fbf", "#b8860b", "#c23b6b", "#3a8f9e", "#7a6a5a"),
)
DARK = Theme(
    "#15191f",
    "#e6edf3",
    "#323a45",
    "#ffffff",
    ("#8cc4ff", "#2f6299", "#1d232c", "#9c5130", "#ffb08a"),
    ("#1d232c", "#24507f", "#3f8ad6", "#b9dcff"),
    ("#6cb0f5", "#f2935c", "#63c48d", "#bb8df0", "#e0b84a", "#f07ca4", "#6fc7d6", "#b5a695"),
)
THEMES: Mapping[str, Theme] = {"light": LIGHT, "dark": DARK}


def figures(facts: Mapping[str, Any], theme: Theme) -> Iterator[tuple[str, Figure]]:
    """(name, figure) of everything there is to draw. facts: those of `vllm-merge inspect --json`.

    Raises UserInputError, saying what to install, where matplotlib is not there.
    """
    with figure_style(theme):
        squares = list(arranged.squares(facts))
        if squares:
            yield "similarity", _similarity(squares, theme)
        lines = arranged.norms(facts)
        if lines is not None:
            yield "norms", _norms(lines, theme)
        yield "modules", _modules(list(arranged.grids(facts)), theme)


def rendered(figure: Figure, kind: Literal["png", "svg"]) -> bytes:
    """The file of a figure; equal figures give equal bytes."""
    to = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else {"Software": None}
    figure.savefig(to, format=kind, dpi=160, facecolor=figure.get_facecolor(), metadata=metadata)
    return to.getvalue()


@contextmanager
def figure_style(theme: Theme) -> Iterator[None]:
    try:
        import matplotlib as mpl
    except ImportError:
        raise UserInputError(MISSING) from None
    settings = {
        "figure.facecolor": theme.back,
        "axes.facecolor": theme.back,
        "axes.edgecolor": theme.faint,
        "axes.labelcolor": theme.text,
        "axes.titlesize": 11,
        "axes.titlelocation": "left",
        "axes.titlepad": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "text.color": theme.text,
        "xtick.color": theme.text,
        "ytick.color": theme.text,
        "xtick.labelsize": 8.5,
        "ytick.labelsize": 8.5,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 9,
        "svg.hashsalt": "vllm-merge",
    }
    with mpl.rc_context(settings):
        yield


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure  # without pyplot: no state, no display

    return Figure(figsize=(width, height), layout="constrained")


def _similarity(squares: Sequence[arranged.Square], theme: Theme) -> Figure:
    largest = max(len(square.names) for square in squares)
    side = min(max(2.9, 0.46 * largest + 1.5), 9.0)
    figure = _figure(side * len(squares), side + 0.3)
    for axes, square in zip(figure.subplots(1, len(squares)), squares, strict=True):
        image = _cells(axes, square.values, theme, low=square.low, high=1.0, digits=2)
        if largest > MOST_NUMBERS:
            _scale(axes, image)
        axes.set_title(square.title)
        labels = [_short(name) for name in square.names]
        _label(axes.set_xticks, labels, rotation=90)
        _label(axes.set_yticks, labels)
        if square.names[-1] == arranged.RESULT:
            for line in (axes.axhline, axes.axvline):
                line(len(labels) - 1.5, color=theme.text, linewidth=1)
    return figure


def _norms(norms: arranged.Norms, theme: Theme) -> Figure:
    figure = _figure(8.4, 3.4)
    axes = figure.subplots()
    places = range(len(norms.layers))
    for index, (name, values) in enumerate(norms.lines.items()):
        result = name == arranged.RESULT
        color = theme.result if result else theme.lines[index % len(theme.lines)]
        style: Any = "-" if result or index < len(theme.lines) else (":" if index < 2 * len(theme.lines) else "--")
        width = 2.6 if result else 1.5
        marker = "o" if len(norms.layers) <= MOST_NUMBERS else ""
        axes.plot(places, values, label=_short(name), color=color, ls=style, lw=width, marker=marker, ms=3.5)
    _label(axes.set_xticks, norms.layers)
    axes.set_xlabel("layer")
    axes.set_title("Norm of the weight change by layer, of the adapters and the result")
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color=theme.faint, linewidth=0.7)
    axes.spines["left"].set_visible(False)
    columns = 1 if len(norms.lines) <= 12 else 2
    legend = axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8.5, ncols=columns)
    for text in legend.get_texts():
        text.set_color(theme.text)
    return figure


def _modules(grids: Sequence[arranged.Grid], theme: Theme) -> Figure:
    rows, columns = len(grids[0].kinds), len(grids[0].layers)
    across = 1 if columns > MOST_NUMBERS else 2
    down = -(-len(grids) // across)
    width = max(3.2, min(0.5 * columns, 9.0)) + 1.7
    figure = _figure(across * width, down * (max(1.0, 0.3 * rows) + 0.9))
    places = figure.subplots(down, across, squeeze=False).flatten()
    for axes in places[len(grids) :]:
        axes.set_visible(False)
    for axes, grid in zip(places, grids, strict=False):
        high = 1.0 if grid.share else None
        image = _cells(axes, grid.values, theme, low=grid.low, high=high, digits=2 if grid.share else 1, square=False)
        axes.set_title(grid.title)
        _label(axes.set_xticks, grid.layers)
        _label(axes.set_yticks, [_short(kind.rpartition(".")[2]) for kind in grid.kinds])
        axes.set_xlabel("layer")
        if columns > MOST_NUMBERS:
            _scale(axes, image)
    return figure


def _cells(
    axes: Axes,
    values: Sequence[Sequence[float]],
    theme: Theme,
    *,
    low: float,
    high: float | None,
    digits: int,
    square: bool = True,
) -> Any:
    """A matrix of coloured cells, with their numbers where there is room for them; cells without a value stay empty."""
    import numpy as np
    from matplotlib.colors import LinearSegmentedColormap

    data = np.array(values, dtype=float)
    table = cast(Any, np.ma).MaskedArray(data, np.isnan(data))
    top = high if high is not None else float(table.max()) if table.count() else 1.0
    image = axes.imshow(
        table,
        cmap=LinearSegmentedColormap.from_list("", theme.signed if low < 0 else theme.plain),
        vmin=low,
        vmax=top or 1.0,
        aspect="equal" if square else "auto",
    )
    for side in axes.spines.values():
        side.set_visible(False)
    height, width = table.shape
    axes.set_xticks(np.arange(-0.5, width), minor=True)
    axes.set_yticks(np.arange(-0.5, height), minor=True)
    axes.grid(which="minor", color=theme.back, linewidth=1.2)
    axes.tick_params(which="both", length=0)
    if width <= MOST_NUMBERS:
        for (row, column), value in np.ndenumerate(table):
            if value is np.ma.masked or np.isnan(value):
                axes.text(column, row, "–", ha="center", va="center", fontsize=7.5)
            else:
                red, green, blue, _ = image.cmap(image.norm(value))
                dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.55
                text = f"{value:.{digits}f}".replace("-0.00", "0.00")
                color = "#ffffff" if dark else "#111418"
                axes.text(column, row, text, ha="center", va="center", fontsize=7.5, color=color)
    return image


def _scale(axes: Axes, image: Any) -> None:
    """What the colours mean, where the cells have no numbers."""
    bar = axes.figure.colorbar(image, ax=axes, fraction=0.03, pad=0.015)
    bar.outline.set_visible(False)


def _label(set_ticks: Any, labels: Sequence[str], **more: Any) -> None:
    """Every label, or every second, third, … so that they do not run into each other."""
    step = -(-len(labels) // MOST_LABELS)
    set_ticks(range(0, len(labels), step), labels[::step], **more)


def _short(name: str) -> str:
    half = LONGEST_NAME // 2
    return name if len(name) <= LONGEST_NAME else f"{name[:half]}…{name[-half + 1 :]}"
