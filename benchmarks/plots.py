# SPDX-License-Identifier: Apache-2.0
"""Plots of the results, beside their JSON files.

python benchmarks/plots.py benchmarks/results/*.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from growth import ALONG, series

SIZE = (12.0, 8.5)


def plot_speed(path: Path) -> None:
    """merge_speed.json: the table against its goals and floors, and what time and memory grow with."""
    figure, axes = _figure(2, 2)
    if figure is None:
        return
    content = json.loads(path.read_text())
    rows = content["rows"]
    _table(axes[0][0], [row for row in rows if row["part"] == "table"])
    _growth(axes[0][1], rows, "n", "seconds")
    _growth(axes[1][0], rows, "r", "seconds")
    _growth(axes[1][1], rows, "layers", "workspace_bytes")
    figure.suptitle(f"{content['device']}, torch {content['torch']}, {content['date']}")
    _save(figure, path)


def plot_stall(path: Path) -> None:
    """stall.json: the gaps between the tokens of running streams, by phase."""
    figure, axes = _figure(1, 1)
    if figure is None:
        return
    content = json.loads(path.read_text())
    axis, rows = axes[0][0], content["rows"]
    for offset, quantile in enumerate(("p50", "p99", "p999", "max")):
        places = [index + 0.2 * (offset - 1.5) for index in range(len(rows))]
        axis.bar(places, [row[quantile] for row in rows], 0.2, label=quantile)
    axis.set_xticks(range(len(rows)), [row["phase"] for row in rows])
    axis.set_yscale("log")
    axis.set_ylabel("milliseconds between tokens")
    axis.legend()
    figure.suptitle(f"{content['device']}, vLLM {content['vllm']}, {content['date']}")
    _save(figure, path)


def plot_serving(path: Path) -> None:
    """serving.json: time to first token, throughput, and memory over many merges."""
    figure, axes = _figure(1, 3)
    if figure is None:
        return
    content = json.loads(path.read_text())
    first, second, third = axes[0]
    if tokens := content["first_token_seconds"]:
        first.boxplot([1e3 * _array(values) for values in tokens.values()], tick_labels=list(tokens), vert=False)
        first.set_xscale("log")
    first.set_xlabel("milliseconds to the first token")
    speeds = {row["what"]: row["tokens_per_second"] for row in content["throughput"]}
    second.barh(list(speeds), list(speeds.values()))
    second.set_xlabel("tokens per second")
    if memory := content["memory"]:
        for name, values in memory["bytes"].items():
            third.plot(memory["merges"], (_array(values) - values[0]) / 1e6, label=name)
        third.legend()
    third.set_xlabel("merges")
    third.set_ylabel("MB above the first sample")
    figure.suptitle(f"{content['device']}, vLLM {content['vllm']}, {content['date']}")
    _save(figure, path)


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
    if not rows:
        return
    rows = rows[::-1]
    names = [row["case"] for row in rows]
    axis.barh(names, [1e3 * row["seconds"] for row in rows], color="tab:blue", label="measured")
    axis.scatter([1e3 * row["floor_seconds"] for row in rows], names, marker="|", s=90, color="black", label="floor")
    goals = [(1e3 * row["goal"], row["case"]) for row in rows if row["goal"]]
    if goals:
        axis.scatter(*zip(*goals, strict=True), marker="D", s=18, color="tab:red", label="goal")
    axis.set_xscale("log")
    axis.tick_params(axis="y", labelsize=7)
    axis.set_xlabel("milliseconds")
    axis.legend(fontsize=7)


def _growth(axis: Any, rows: list[dict[str, Any]], key: str, value: str) -> None:
    """A line per case, of rows that differ in `key` alone."""
    for case, line in series(rows, key).items():
        axis.plot([row[key] for row in line], [row[value] for row in line], marker="o", label=case)
    axis.set_xlabel(ALONG[key])
    axis.set_ylabel(value.replace("_", " "))
    if axis.lines:
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.legend(fontsize=7)


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
