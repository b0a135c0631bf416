# SPDX-License-Identifier: Apache-2.0
"""The plots of the quality benchmark, from the scores alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.quality.grid import FIRST, LOSSLESS
from benchmarks.quality.scores import Family, Scores

COLOURS = 10  # before they come again
LEAST_RANKS = 3  # two are in the table already
SHOWN = 24  # rows of a plot that would have one for every method


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
    for place, family in enumerate(those):
        x, y = scores.seconds(family), 100 * scores.score(family).value
        if place < SHOWN // 2 or (family.method, family.space) in FIRST:
            axis.annotate(_named(family), (x, y), fontsize=7, xytext=(3, 2), textcoords="offset points")
    axis.margins(x=0.2)  # room for the names
    axis.set(
        xscale="log", xlabel="seconds of the merge", ylabel="score, %", title=f"{len(scores.tasks)} tasks, lossless"
    )
    return bool(those)


def _ranks(axis: Any, scores: Scores) -> bool:
    """Score against the rank of the result, of the first seed; at the right end lossless."""
    seed = min((seed for seeds in scores.families.values() for seed in seeds), default=0)
    drawn, lines = 0, ("o-", "s--", "^:")
    for method, space in FIRST:
        those = {
            family.rank: 100 * scores.score(family, [seed]).value
            for family, seeds in scores.families.items()
            if (family.set, family.size, family.method, family.space) == ("plain", len(scores.tasks), method, space)
            and seed in seeds
        }
        ranks = sorted(int(rank) for rank in those if rank != LOSSLESS)
        names = [*map(str, ranks), *([LOSSLESS] if LOSSLESS in those else [])]
        if len(names) >= LEAST_RANKS:
            axis.plot(names, [those[name] for name in names], lines[drawn // COLOURS], label=f"{method} {space}")
            drawn += 1
    axis.set(xlabel="rank of the result", ylabel="score, %", title=f"{len(scores.tasks)} tasks, one seed")
    if drawn:
        axis.legend(fontsize=7)
    return drawn > 0


def _norms(axis: Any, scores: Scores) -> bool:
    """What DO-Merging gives over task arithmetic, against how unequal the two adapters are."""
    losses: dict[tuple[str, ...], dict[str, float]] = {}
    ratios: dict[tuple[str, ...], float] = {}
    for row in scores.merges:
        if row["set"] == "mixed" and len(row["tasks"]) == 2 and row["report"] and row["rank"] == LOSSLESS:
            pair = (str(row["seed"]), *row["tasks"])
            losses.setdefault(pair, {})[row["method"]] = scores.loss(row)
            ratios[pair] = row["report"]["norm ratio"]
    both = [pair for pair, mine in losses.items() if {"do_merging", "task_arithmetic"} <= mine.keys()]
    gains = [100 * (losses[pair]["task_arithmetic"] - losses[pair]["do_merging"]) for pair in both]
    axis.scatter([ratios[pair] for pair in both], gains, s=18)
    axis.axhline(0, color="grey", linewidth=0.8)
    axis.set(xscale="log", xlabel="larger norm over smaller", ylabel="DO-Merging over task arithmetic, points")
    axis.set_title("pairs of the mixed set")
    return bool(both)


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
