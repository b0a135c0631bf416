# SPDX-License-Identifier: Apache-2.0
"""The plots of the quality benchmark, from the scores alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.quality.grid import FIRST, LOSSLESS
from benchmarks.quality.predictors import unequal
from benchmarks.quality.scores import Family, Scores, curves

MARKERS, COLOURS = "os^vD", (*(f"C{index}" for index in range(10)), "black", "gold")
RATIOS = (1, 1.5, 2, 3, 4, 5, 6)
SHOWN = 24  # rows of a plot that would have one for every method
SIDES = (  # of a point where its name may stand, in points
    *((4, 2, "left"), (-4, 2, "right"), (4, -8, "left"), (-4, -8, "right")),
    *((0, 5, "center"), (0, -11, "center"), (4, 9, "left"), (-4, -15, "right")),
)


def write_plots(scores: Scores, folder: Path) -> list[str]:
    """Write those that there is data for, and remove the others; the names of the files. None without matplotlib, which is said."""
    try:
        import matplotlib
    except ImportError:
        print("no plots: matplotlib is not installed (pip install matplotlib)")
        return []
    matplotlib.use("Agg")
    from matplotlib import pyplot

    written = []
    plots: dict[str, Callable[[Any, Scores], bool]] = {
        "seconds": _seconds,
        "ranks": _ranks,
        "norms": _norms,
        "osrm": _osrm,
        "tasks": _tasks,
    }
    for name, plot in plots.items():
        figure, axis = pyplot.subplots(figsize=(9, 6), layout="constrained")
        path = folder / f"{name}.png"
        if plot(axis, scores):
            figure.savefig(path, dpi=110)
            written.append(path.name)
        else:
            path.unlink(missing_ok=True)
        pyplot.close(figure)
    return written


def _named(family: Family) -> str:
    return f"{family.method} {family.space}"


def _of(scores: Scores, kind: str, rank: str) -> list[Family]:
    size = len(scores.tasks)
    those = [f for f in scores.families if (f.set, f.size, f.rank) == (kind, size, rank)]
    return sorted(those, key=lambda family: -scores.score(family).value)


def _seconds(axis: Any, scores: Scores) -> bool:
    """Score against the time of the merge, lossless."""
    those = _of(scores, "plain", LOSSLESS)
    for several, colour in ((True, "tab:red"), (False, "tab:blue")):
        mine = [family for family in those if (len(scores.families[family]) > 1) is several]
        places = [(scores.seconds(family), 100 * scores.score(family).value) for family in mine]
        if places:
            label = "several seeds" if several else "one seed"
            axis.scatter(*zip(*places, strict=True), color=colour, s=18, label=label)
        if 0 < len(mine) < len(those):
            axis.legend(fontsize=7)
    axis.margins(x=0.15)  # room for the names
    axis.set(
        xscale="log", xlabel="seconds of the merge", ylabel="score, %", title=f"{len(scores.tasks)} tasks, lossless"
    )
    axis.xaxis.set_major_formatter("{x:g}")
    points = {family: (scores.seconds(family), 100 * scores.score(family).value) for family in those}
    best = those[: SHOWN // 2]
    named = sorted({*best, *(f for f in those if (f.method, f.space) in FIRST)}, key=lambda family: -points[family][1])
    _name(axis, list(points.values()), [(_named(family), points[family]) for family in named])
    return bool(those)


Point = tuple[float, float]


def _name(axis: Any, points: list[Point], names: list[tuple[str, Point]]) -> None:
    """Write names beside their points where neither a point nor another name is; a name without such a place is left out."""
    from matplotlib.transforms import Bbox

    axis.figure.canvas.draw()  # from here on places are known
    frame = axis.get_window_extent()
    taken = [Bbox.from_bounds(x - 3, y - 3, 6, 6) for x, y in axis.transData.transform(points)] if points else []
    for name, point in names:
        for right, up, side in SIDES:
            text = axis.annotate(name, point, (right, up), textcoords="offset points", ha=side, fontsize=7)
            box = text.get_window_extent()
            if frame.x0 < box.x0 and box.x1 < frame.x1 and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            text.remove()


def _ranks(axis: Any, scores: Scores) -> bool:
    """Score against the rank of the result, of the first seed; at the right end lossless."""
    found = curves(scores)
    for place, (name, curve) in enumerate(found.items()):
        marker, colour = MARKERS[place % len(MARKERS)], COLOURS[place % len(COLOURS)]
        values = [100 * value for value in curve.values()]
        axis.plot(list(curve), values, marker=marker, color=colour, markersize=5, label=name)
    axis.set(xlabel="rank of the result", ylabel="score, %", title=f"{len(scores.tasks)} tasks, one seed")
    if found:
        beside = (1.01, 1)  # in the order of the right end
        axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=beside, frameon=False)
    return bool(found)


def _norms(axis: Any, scores: Scores) -> bool:
    """What DO-Merging gives over task arithmetic, against how unequal the two adapters are."""
    found = unequal(scores)
    if found is None:
        return False
    axis.scatter(found.ratios, [100 * gain for gain in found.gains], s=18)
    axis.axhline(0, color="grey", linewidth=0.8)
    axis.set(xscale="log", xlabel="larger norm over smaller", ylabel="DO-Merging over task arithmetic, points")
    axis.set_xticks(RATIOS, [f"{ratio:g}" for ratio in RATIOS])
    axis.set_xticks([], minor=True)
    axis.set_title("pairs of the mixed set")
    return True


def _osrm(axis: Any, scores: Scores) -> bool:
    """Each method with plain and with OSRM adapters."""
    those = [f for f in _of(scores, "osrm", LOSSLESS) if f.other(set="plain") in scores.families][:SHOWN][::-1]
    for place, family in enumerate(those):
        both = family.other(set="plain"), family
        seeds = scores.common_seeds(both)
        plain, lifted = (100 * scores.score(*of).value for of in ((both[0], seeds, both[1]), (both[1], seeds, both[0])))
        axis.plot([plain, lifted], [place, place], color="grey", linewidth=1)
        axis.scatter(plain, place, color="tab:blue", s=22, label="plain" if place == 0 else None)
        axis.scatter(lifted, place, color="tab:red", s=22, label="OSRM" if place == 0 else None)
    axis.set_yticks(range(len(those)), [_named(family) for family in those], fontsize=7)
    axis.set(xlabel="score, %", title=f"{len(scores.tasks)} tasks, lossless")
    if those:
        axis.legend()
    return bool(those)


def _tasks(axis: Any, scores: Scores) -> bool:
    """Score of every task under every method."""
    those = _of(scores, "plain", LOSSLESS)[:SHOWN]
    if not those:
        return False
    values = [[100 * scores.by_task(f).get(task, float("nan")) for task in scores.tasks] for f in those]
    image = axis.imshow(values, aspect="auto", vmin=0, vmax=100, cmap="viridis")
    axis.set_xticks(range(len(scores.tasks)), scores.tasks, rotation=30)
    axis.set_yticks(range(len(those)), [_named(family) for family in those], fontsize=7)
    for row, mine in enumerate(values):
        for column, value in enumerate(mine):
            axis.text(
                column,
                row,
                f"{value:.0f}",
                ha="center",
                va="center",
                fontsize=6,
                color="white" if value < 60 else "black",
            )
    axis.figure.colorbar(image, label="score, %")
    return True
