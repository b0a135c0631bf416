# SPDX-License-Identifier: Apache-2.0
"""One self-contained HTML page about an adapter or a merge: no script, no other file, no other host; light and dark."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from vllm_merge.report.facts import RESULT
from vllm_merge.report.plots import THEMES, figures, rendered

CAPTIONS = {
    "similarity": "How the adapters lie to each other over the whole model. Cosine: of the weight changes, the result "
    "beside them. Overlap: ‖U<sub>i</sub>ᵀU<sub>j</sub>‖² / min(r<sub>i</sub>, r<sub>j</sub>) of their output and input "
    "spaces, 1 where one lies within the other.",
    "norms": "In a layer where one adapter is much larger than the others, most of their sum is its.",
    "modules": "Every module by kind and layer. Effective rank: how many directions the result spreads its weight over. "
    "Sign conflict: the share of entries on which adapters disagree.",
}
STYLE = """
:root { color-scheme: light dark; --back: #ffffff; --text: #1f2328; --soft: #59636e; --line: #d8dee4; --warn: #9a6700; }
@media (prefers-color-scheme: dark) {
  :root { --back: #15191f; --text: #e6edf3; --soft: #9aa5b1; --line: #323a45; --warn: #e0b84a; } }
body { margin: 0 auto; padding: 2.5rem 1.5rem 4rem; max-width: 72rem; background: var(--back); color: var(--text);
  font: 15px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.7rem; margin: 0; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin: 2.6rem 0 .6rem; }
.soft, figcaption { color: var(--soft); } .warning { border-left: 3px solid var(--warn); padding-left: .8rem; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: 1rem 2rem; margin: 1.6rem 0 0; }
dt { color: var(--soft); font-size: .85rem; } dd { margin: 0; font-size: 1.25rem; }
figure { margin: 0 0 2rem; } figure img { max-width: 100%; height: auto; display: block; }
figcaption { font-size: .9rem; max-width: 46rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; } th, td { padding: .3rem 1.4rem .3rem 0; white-space: nowrap; }
tr { border-bottom: 1px solid var(--line); } td + td, th + th { text-align: right; }
code, pre { font: .85rem/1.5 ui-monospace, monospace; overflow-wrap: anywhere; } pre { overflow-x: auto; }
summary { cursor: pointer; color: var(--soft); }
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def page(facts: Mapping[str, Any]) -> str:
    """The page for the facts of `vllm-merge inspect --json`. Raises UserInputError where matplotlib is not installed."""
    report = facts.get("report") or {}
    title = str((facts.get("provenance") or {}).get("artifact", facts["name"]))
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
        f'<div class="soft">{escape(_subtitle(facts))}</div>',
        *(f'<p class="warning">{escape(str(warning))}</p>' for warning in _warnings(facts)),
        "<dl>",
        *(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in _headline(facts)),
        "</dl>",
        *_figures(facts),
    ]
    if report.get("overall"):
        parts += ["<h2>Adapters</h2>", html_table(*adapter_rows(report))]
    parts += ["<h2>Modules</h2>", html_table(*module_rows(facts))]
    if report.get("seconds"):
        rows = [[stage, f"{seconds:.3f}"] for stage, seconds in report["seconds"].items()]
        parts += ["<h2>Time</h2>", html_table(["stage", "seconds"], rows)]
    if "provenance" in facts:
        text = json.dumps(facts["provenance"], indent=2, ensure_ascii=False)
        parts += [f"<h2>Recipe</h2><details><summary>as it was resolved</summary><pre>{escape(text)}</pre></details>"]
    return "\n".join([*parts, "</body></html>", ""])


def adapter_rows(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of adapters: norm, cosine with the result, and the nearest other adapter."""
    names, overall = report["adapters"], report["overall"]
    cosines: dict[tuple[int, int], float | None] = {}
    values = iter(overall["cosines"])
    for i in range(len(names)):
        for j in range(i + 1, len(names)):
            cosines[i, j] = cosines[j, i] = next(values)
    rows = []
    for i, name in enumerate(names):
        others = {j: c for j in range(len(names)) if j != i and (c := cosines[i, j]) is not None}
        nearest = max(others, key=lambda j: abs(others[j]), default=None)
        near = "" if nearest is None else f"{names[nearest]} {others[nearest]:+.3f}"
        rows.append([name, number(overall["input_norms"][i]), number(overall["result_cosines"][i]), near])
    rows.append([RESULT, number(overall["norm"]), "", ""])
    return ["adapter", "norm", "cosine with result", "largest cosine with another"], rows


def module_rows(facts: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of modules; columns of a merge's report where it has them."""
    report = facts.get("report") or {}
    merged = bool(report)
    extra = [name for name in ("effective_rank", "sign_conflict") if report.get(name)]
    head = ["module", "d_out", "d_in", "rank", "scaling", "norm", *(["energy kept"] if merged else [])]
    rows = []
    for module, row in facts["modules"].items():
        cells = [module, *(str(row[key]) for key in ("d_out", "d_in", "rank"))]
        cells += [f"{row['scaling']:g}", f"{row['norm']:.4g}"]
        if merged:
            share = report["energy_kept"].get(module)
            cells.append("all" if share is None else f"{share:.2%}")
        for name in extra:
            value = report[name].get(module)
            cells.append("" if value is None else f"{value:.1%}" if name == "sign_conflict" else f"{value:.1f}")
        rows.append(cells)
    return [*head, *(name.replace("_", " ") for name in extra)], rows


def number(value: float | None) -> str:
    """A figure of a table; empty where there is none."""
    return "" if value is None else f"{value:.4g}"


def _subtitle(facts: Mapping[str, Any]) -> str:
    report = facts.get("report")
    base = f"base model {facts['base_model'] or 'not named'}"
    if not report:
        return f"adapter, {base}"
    return f"{report['method']} in {report['space']} of {len(report['adapters'])} adapters, {base}"


def _warnings(facts: Mapping[str, Any]) -> list[str]:
    return [*facts["warnings"], *(facts.get("report") or {}).get("warnings", [])]


def _headline(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "modules", str(len(facts["modules"]))
    yield "rank", str(facts["rank"])
    yield "norm", f"{facts['norm']:.4g}"
    yield "bytes", f"{facts['bytes']:,}"
    overall = (facts.get("report") or {}).get("overall")
    if overall:
        yield "energy kept", f"{overall['energy_kept']:.2%}"
        if overall["effective_rank"] is not None:
            yield "effective rank", f"{overall['effective_rank']:.1f}"
        if overall["sign_conflict"] is not None:
            yield "sign conflict", f"{overall['sign_conflict']:.1%}"


def _figures(facts: Mapping[str, Any]) -> Iterator[str]:
    """Each figure twice, for light and for dark pages."""
    drawn = {
        theme: {name: rendered(figure, "svg") for name, figure in figures(facts, colors)}
        for theme, colors in THEMES.items()
    }
    for name in drawn["light"]:
        yield html_figure(name, drawn["light"][name], drawn["dark"][name], CAPTIONS[name])


def html_figure(name: str, light: bytes, dark: bytes, caption: str) -> str:
    """A figure for light and one for dark pages, both SVG; the browser shows the one that fits. caption: HTML."""
    source, other = (f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}" for svg in (light, dark))
    return (
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{other}">'
        f'<img src="{source}" alt="{escape(name)}"></picture><figcaption>{caption}</figcaption></figure>'
    )


def html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of plain text cells."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = ("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    body = "\n".join(lines)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>\n{body}\n</tbody></table></div>'
