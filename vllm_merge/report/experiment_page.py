# SPDX-License-Identifier: Apache-2.0
"""One self-contained HTML page about an experiment: no script, no other file, no other host; light and dark."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from vllm_merge.report import experiment_rows as rows
from vllm_merge.report.experiment_plots import experiment_figures
from vllm_merge.report.page import POLICY, STYLE, html_figure, html_table
from vllm_merge.report.plots import THEMES, rendered

CAPTIONS = {
    "course": "The difference as units came in, and its interval. The intervals hold at all times together: whoever stops at the "
    "first one that leaves 0 is wrong as seldom as it says.",
    "metrics": "Every metric as a share of control. Only the primary metric decides; the others explain.",
}
SECTIONS = (
    ("Arms", rows.arm_rows),
    ("Metrics", rows.value_rows),
    ("Differences from control", rows.difference_rows),
    ("Latencies", rows.latency_rows),
    ("Two answers to the same request", rows.paired_rows),
    ("Guardrails", rows.guardrail_rows),
    ("Decisions", rows.decision_rows),
)


def experiment_page(facts: Mapping[str, Any]) -> str:
    """The page for the facts of `vllm-merge experiment report --json`. Raises UserInputError without matplotlib."""
    title = facts["experiment"]
    subtitle = f"{rows.version(facts)}, {facts['state']}; {rows.moment(facts['at'])}; {facts['store']}"
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
        f'<div class="soft">{escape(subtitle)}</div>',
        f"<p><strong>{escape(facts['verdict']['sentence'])}</strong></p>",
        *(f'<p class="warning">{escape(note)}</p>' for note in rows.notes(facts)),
        "<dl>",
        *(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in _headline(facts)),
        "</dl>",
        *_figures(facts),
    ]
    for name, section in SECTIONS:
        head, lines = section(facts)
        if lines:
            parts += [f"<h2>{name}</h2>", html_table(head, lines)]
    text = json.dumps(facts["definition"], indent=2, ensure_ascii=False)
    parts += [f"<h2>Definition</h2><details><summary>as it runs</summary><pre>{escape(text)}</pre></details>"]
    return "\n".join([*parts, "</body></html>", ""])


def _headline(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "units", f"{sum(arm['units'] for arm in facts['arms']):,}"
    yield "requests", f"{sum(arm['requests'] for arm in facts['arms']):,}"
    yield "outcomes", f"{sum(found['count'] for found in facts['outcomes'].values()):,}"
    yield "sample ratio, p", rows.probability(facts["imbalance"]["always"])
    if facts["primary"] and facts["primary"]["variance_saved"] > 0:
        yield "variance taken out by the past", f"{facts['primary']['variance_saved']:.0%}"


def _figures(facts: Mapping[str, Any]) -> Iterator[str]:
    drawn = {
        theme: {name: rendered(figure, "svg") for name, figure in experiment_figures(facts, colors)}
        for theme, colors in THEMES.items()
    }
    for name, light in drawn["light"].items():
        yield html_figure(name, light, drawn["dark"][name], CAPTIONS[name])
