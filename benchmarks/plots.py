# SPDX-License-Identifier: Apache-2.0
"""Plots of the results, beside their JSON files.

python benchmarks/plots.py benchmarks/results/*.json
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from calibrate import Foretold, each_point_left_out, point_of, rows_of, seconds_of
from growth import ALONG, series, took

SIZE = (12.0, 8.5)
COLORS, MARKERS = ("tab:blue", "tab:gray", "tab:olive"), "ox+"  # of the runs that a file is of, the latest first
QUANTILES = {"p50": "median", "p99": "99th percentile", "p999": "99.9th percentile", "max": "longest"}


def plot_speed(path: Path) -> None:
    """merge_speed.json: the table against its goals and floors, what time and memory grow with, and how well points are
    foretold from the others; of these what was measured.
    """
    content = json.loads(path.read_text())
    rows = content["rows"]
    table = [row for row in rows if row["part"] == "table"]
    panels: list[Callable[[Any], None]] = [partial(_table, rows=table)] if table else []
    for key, value in (("n", "seconds"), ("r", "seconds"), ("layers", "workspace_bytes")):
        if series(rows, key):
            panels.append(partial(_growth, rows=rows, key=key, value=value))
    if any(row["part"] == "held_out" for row in rows):
        panels.append(partial(_foretold, content=content))
    if not panels:
        return
    figure, axes = _figure(-(-len(panels) // 2), min(2, len(panels)))
    if figure is None:
        return
    every = [axis for line in axes for axis in line]
    for axis, panel in zip(every, panels, strict=False):
        panel(axis)
    for axis in every[len(panels) :]:
        axis.remove()
    figure.suptitle(f"{content['device']}, torch {content['torch']}, {content['date']}")
    _save(figure, path)


def plot_stall(path: Path) -> None:
    """stall.json: the gaps between the tokens of running streams, by phase."""
    figure, axes = _figure(1, 1)
    if figure is None:
        return
    content = json.loads(path.read_text())
    axis, rows = axes[0][0], content["rows"]
    for (quantile, name), marker in zip(QUANTILES.items(), "os^D", strict=True):
        axis.plot([row[quantile] for row in rows], marker, label=name, markersize=9)
    for index, row in enumerate(rows):
        values = sorted(row[quantile] for quantile in QUANTILES)
        for value, above in zip(values, [*values[1:], float("inf")], strict=True):
            if above > 1.04 * value:  # else the one above would cover it
                axis.annotate(f"{value:.3g}", (index, value), (9, -3), textcoords="offset points", fontsize=8)
    axis.set_xticks(range(len(rows)), [row["phase"] for row in rows])
    axis.set_xlim(-0.5, len(rows) - 0.3)
    axis.set_yscale("log")
    axis.set_ylabel(f"milliseconds between tokens of {content['streams']} streams")
    axis.grid(axis="y", which="both", alpha=0.3)
    axis.legend()
    figure.suptitle(_title(content))
    _save(figure, path)


def plot_serving(path: Path) -> None:
    """serving.json: of time to first token, throughput, and memory over many merges what it has."""
    content = json.loads(path.read_text())
    parts = [
        draw
        for key, draw in (("first_token_seconds", _first_tokens), ("throughput", _throughput), ("memory", _memory))
        if content[key]
    ]
    figure, axes = _figure(1, max(1, len(parts)))
    if figure is None:
        return
    for axis, draw in zip(axes[0], parts, strict=False):
        draw(axis, content)
    figure.suptitle(_title(content))
    _save(figure, path)


def _first_tokens(axis: Any, content: dict[str, Any]) -> None:
    tokens = sorted(content["first_token_seconds"].items(), key=lambda item: -_array(item[1]).mean())
    labels = [f"{name.replace('_', ' ')} ({len(values)})" for name, values in tokens]
    axis.boxplot([1e3 * _array(values) for _, values in tokens], tick_labels=labels, orientation="horizontal")
    axis.set_xscale("log")
    axis.set_xlabel("milliseconds to the first token (requests)")


def _throughput(axis: Any, content: dict[str, Any]) -> None:
    speeds = {row["what"].replace(", ", ",\n"): row["tokens_per_second"] for row in content["throughput"]}
    axis.bar_label(axis.barh(list(speeds), list(speeds.values())), fmt="%.0f", label_type="center", color="white")
    axis.set_xlabel("tokens per second")


def _memory(axis: Any, content: dict[str, Any]) -> None:
    memory = content["memory"]
    for (name, values), line in zip(memory["bytes"].items(), ("-", "--", "-.", ":"), strict=False):
        axis.plot(memory["merges"], (_array(values) - values[0]) / 1e6, line, label=name, linewidth=2)
    axis.legend()
    axis.set_xlabel("merges")
    axis.set_ylabel("MB above the first sample")


def _title(content: dict[str, Any]) -> str:
    graphs = "CUDA graphs" if content["cuda_graphs"] else "eager"
    return f"{content['device']}, vLLM {content['vllm']}, {graphs}, shape {content['shape']}, {content['date']}"


def _array(values: list[float]) -> Any:
    import numpy

    return numpy.array(values)


def _figure(rows: int, columns: int) -> tuple[Any, Any]:
    """A figure and its axes as a matrix; (None, None), said once, where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed (pip install matplotlib, then python benchmarks/plots.py FILE)")
        return None, None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, columns, figsize=SIZE, layout="constrained", squeeze=False)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    target = path.with_suffix(".png")
    figure.savefig(target, dpi=110)
    print(f"wrote {target}")


def _table(axis: Any, rows: list[dict[str, Any]]) -> None:
    of_run = dict(zip(_records(rows), COLORS, strict=False))
    rows = rows[::-1]
    names = [row["case"] for row in rows]
    axis.barh(names, [1e3 * row["seconds"] for row in rows], color=[of_run[row.get("record")] for row in rows])
    for record, color in of_run.items():
        label = f"measured, {record.removesuffix('.md')}" if record else "measured"
        axis.scatter([], [], marker="s", color=color, label=label)
    axis.scatter([1e3 * row["floor_seconds"] for row in rows], names, marker="|", s=90, color="black", label="floor")
    goals = [(1e3 * row["goal"], row["case"]) for row in rows if row["goal"]]
    if goals:
        axis.scatter(*zip(*goals, strict=True), marker="D", s=18, color="tab:red", label="goal")
    axis.set_xscale("log")
    axis.tick_params(axis="y", labelsize=min(7, 180 / len(rows)))
    axis.set_xlabel("milliseconds")
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))


def _records(rows: list[dict[str, Any]]) -> list[str | None]:
    """The records that rows belong to, in the order of the rows: more than one where a file is of several runs."""
    return list(dict.fromkeys(row.get("record") for row in rows))


def _growth(axis: Any, rows: list[dict[str, Any]], key: str, value: str) -> None:
    """A line per case, of rows that differ in `key` alone."""
    for case, line in series(rows, key).items():
        values = [took(row) if value == "seconds" else row[value] for row in line]
        axis.plot([row[key] for row in line], values, marker="o", label=case)
    axis.set_xlabel(ALONG[key])
    axis.set_ylabel(value.replace("_", " "))
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.legend(fontsize=7)


def _foretold(axis: Any, content: dict[str, Any]) -> None:
    """Seconds of each point, forecast from the other points, over measured ones; shaded: within a factor 2. A marker per run."""
    by_point: dict[Any, list[Foretold]] = defaultdict(list)
    for one in each_point_left_out(rows_of(content)):
        if one.seconds is not None:
            by_point[point_of(one.row)].append(one)
    records = _records(content["rows"])
    for index, ((shape, n, r), found) in enumerate(by_point.items()):
        axis.scatter([], [], s=18, color=f"C{index}", label=f"{shape}, n={n}, r={r}")
        for record, marker in zip(records, MARKERS, strict=False):
            mine = [one for one in found if one.row.get("record") == record]
            measured = [1e3 * seconds_of(one.row) for one in mine]
            axis.scatter(measured, [one.seconds for one in mine], s=18, color=f"C{index}", marker=marker)
    for record, marker in zip(records, MARKERS, strict=False):
        if record:
            axis.scatter([], [], s=18, color="black", marker=marker, label=record.removesuffix(".md"))
    if by_point:
        axis.axhspan(0.5, 2, color="tab:green", alpha=0.15)
        axis.set_xscale("log")
        axis.set_yscale("log", base=2)
        axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    axis.set_xlabel("milliseconds measured")
    axis.set_ylabel("forecast from other points / measured")


def main() -> None:
    for name in sys.argv[1:]:
        path = Path(name)
        content = json.loads(path.read_text())
        if "peers" in content:
            plot_speed(path)
        elif "first_token_seconds" in content:
            plot_serving(path)
        else:
            plot_stall(path)


if __name__ == "__main__":
    main()
