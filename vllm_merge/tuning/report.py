# SPDX-License-Identifier: Apache-2.0
"""What a run leaves for people: a page of what was done and gained, and two plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_merge.adapters.factors import natural_key
from vllm_merge.report.plots import LIGHT, figure_style, rendered
from vllm_merge.tuning.methods import METHODS
from vllm_merge.tuning.weights import layer_of

REPORT_FILE, PROGRESS_PLOT, WEIGHTS_PLOT = "report.md", "progress.png", "weights.png"


def page(facts: Mapping[str, Any], plots: Sequence[str]) -> str:
    """The report as Markdown. facts: those of tuning.json; plots: files beside it."""
    run, gain = facts["run"], facts.get("accuracy")
    ended = f"stopped after {run['steps']} of {run['planned']} steps" if run["stopped"] else f"{run['steps']} steps"
    lines = [
        f"# {facts['name']}",
        "",
        f"Learned by `{facts['method']}` ({facts['reference']}) from {facts['data']['prompts']} prompts of "
        f"`{facts['data']['file']}`: {ended}, {run['seconds']:.0f} s on {facts['device']}.",
        "",
        "| | start | learned |",
        "|---|---|---|",
        f"| {run['objective']} | {run['start']:.4g} | {run['best']:.4g} (step {run['best_step']}) |",
    ]
    if gain:
        for task in gain["learned"]["tasks"]:
            lines.append(f"| {task}, % right | {_words(gain['start'], task)} | {_words(gain['learned'], task)} |")
        lines.append(f"| **mean, % right** | {_mean(gain['start'])} | {_mean(gain['learned'])} |")
    if safety := facts.get("safety"):
        lines.append(f"| safe answers, % | {_share(safety['start'])} | {_share(safety['learned'])} |")
    lines += ["", "Scores are of the data that was learned from; measure on other prompts before you promote it.", ""]
    lines += [f"- {note}" for note in facts["notes"]]
    lines += [f"\n![{plot.partition('.')[0]}]({plot})" for plot in plots]
    return "\n".join(lines) + "\n"


def _words(scores: Mapping[str, Any], task: str) -> str:
    return _share(scores["tasks"][task])


def _mean(scores: Mapping[str, Any]) -> str:
    return _share(scores["mean"])


def _share(score: Mapping[str, Any]) -> str:
    return f"{100 * score['accuracy']:.0f} ({100 * score['low']:.0f}–{100 * score['high']:.0f})"


def plot(folder: Path, facts: Mapping[str, Any], weights: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Draw the progress, and the weights, {adapter or source: {module: weight}}, by layer where there are any; the files'
    names.

    Raises UserInputError, saying what to install, where matplotlib is not there.
    """
    with figure_style(LIGHT):
        regression = METHODS[facts["method"]].kind == "regression"  # whose steps have an error of another kind
        drawn = [(PROGRESS_PLOT, _progress(facts["run"], losses=not regression))]
        if weights:
            drawn.append((WEIGHTS_PLOT, _weights(weights)))
        for name, figure in drawn:
            (folder / name).write_bytes(rendered(figure, "png"))
    return [name for name, _ in drawn]


def _progress(run: Mapping[str, Any], *, losses: bool) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    if losses:
        steps = [step for step, _, _ in run["history"]]
        axes.plot(steps, [loss for _, loss, _ in run["history"]], color=LIGHT.faint, label="loss of a step")
    checked = [(0, run["start"])] + [(step, value) for step, _, value in run["history"] if value is not None]
    axes.plot(*zip(*checked, strict=True), color=LIGHT.lines[0], marker="o", markersize=3, label="on all data")
    axes.axvline(run["best_step"], color=LIGHT.lines[1], linewidth=1, linestyle=":", label="best")
    axes.set_xlabel("step")
    axes.set_title(run["objective"])
    axes.legend(frameon=False)
    return figure


def _weights(weights: Mapping[str, Mapping[str, float]]) -> Any:
    """The mean weight of each layer, a row for each adapter."""
    import numpy as np
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    layers = sorted({layer_of(module) for mine in weights.values() for module in mine}, key=natural_key)
    cells = np.full((len(weights), len(layers)), np.nan)
    for row, mine in enumerate(weights.values()):
        for column, layer in enumerate(layers):
            found = [weight for module, weight in mine.items() if layer_of(module) == layer]
            cells[row, column] = np.mean(found) if found else np.nan
    figure = Figure(figsize=(min(12, 2.6 + 0.45 * len(layers)), 1.4 + 0.32 * len(weights)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(cells, aspect="auto", cmap=LinearSegmentedColormap.from_list("weights", LIGHT.plain))
    axes.set_yticks(range(len(weights)), list(weights))
    axes.set_xticks(range(len(layers)), [_number(layer) for layer in layers], rotation=0 if len(layers) < 24 else 90)
    axes.set_title("weight by layer")
    figure.colorbar(image, ax=axes)
    return figure


def _number(layer: str) -> str:
    return layer.rstrip(".").rpartition(".")[2]
