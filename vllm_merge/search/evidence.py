# SPDX-License-Identifier: Apache-2.0
"""What is known of the methods before a search: `--auto` begins with what kept most where it was measured.

evidence.json is made from recorded results, and from nothing else:

    python -m vllm_merge.search.evidence benchmarks/results/demo-methods.json benchmarks/results/quality/summary.json

Of each method and space: what the merge of all adapters kept on the demo and in the quality benchmark, as a share of the best there, and
the mean of the two; and the size it had on the demo, which is its λ over the λ at which the result is as large as the sum of the adapters.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

FILE = "evidence.json"
HALF = 0.05  # a method that kept this much less than the best is tried half as often


@dataclass(frozen=True, slots=True)
class Evidence:
    """kept: what the merge keeps of what the adapters get right, as a share of the best. size: of the result, 1 as large as the
    sum."""

    method: str
    space: str
    kept: float
    size: float


@cache
def evidence() -> tuple[Evidence, ...]:
    """What the package knows, best first."""
    text = resources.files(__package__).joinpath(FILE).read_text(encoding="utf-8")
    return tuple(Evidence(**row) for row in json.loads(text)["methods"])


def shares(rows: Iterable[Evidence]) -> dict[tuple[str, str], float]:
    """{(method, space): how often it is tried}, 1 for the best, halved with every HALF that it kept less."""
    rows = list(rows)
    best = max((row.kept for row in rows), default=0.0)
    return {(row.method, row.space): 2 ** ((row.kept - best) / HALF) for row in rows}


def table(demo: Mapping[str, Any], quality: Mapping[str, Any]) -> dict[str, Any]:
    """What evidence.json says of recorded results (demo-methods.json, quality/summary.json)."""
    best, scores = _of_demo(demo), _of_quality(quality)
    most, highest = max(row.kept for row in best.values()), max(scores.values(), default=1.0)
    rows = []
    for (method, space), row in best.items():
        found = [row.kept / most]
        if (method, space) in scores:
            found.append(max(0.0, scores[method, space]) / highest)
        rows.append(Evidence(method, space, round(sum(found) / len(found), 4), row.size))
    rows.sort(key=lambda row: (-row.kept, row.method, row.space))
    return {
        "from": ["benchmarks/results/demo-methods.json", "benchmarks/results/quality/summary.json"],
        "what": "kept: of what the adapters get right on held-out prompts, as a share of the best method; the mean of the demo's eight adapters and "
        "of the quality benchmark (without rank, chance-corrected), or the one that was measured; size: on the demo, chosen λ over the λ at which "
        "the result is as large as the sum",
        "methods": [{"method": r.method, "space": r.space, "kept": r.kept, "size": r.size} for r in rows],
    }


def _of_demo(results: Mapping[str, Any]) -> dict[tuple[str, str], Evidence]:
    """The best row of each method and space over all adapters."""
    most = max(len(row["tasks"]) for row in results["rows"])
    best: dict[tuple[str, str], Evidence] = {}
    for row in results["rows"]:
        if len(row["tasks"]) < most or row["precondition"]:
            continue
        lambdas = {float(value) for value in row["validation"]}
        as_large_as_the_sum = min(lambdas) / min(results["grid"])
        size = min(results["grid"], key=lambda size: abs(size - row["lambda"] / as_large_as_the_sum))
        found = Evidence(row["method"], row["space"], row["kept"], size)
        key = (found.method, found.space)
        if key not in best or best[key].kept < found.kept:
            best[key] = found
    return best


def _of_quality(summary: Mapping[str, Any]) -> dict[tuple[str, str], float]:
    """The scores of lossless merges of most plain adapters."""
    families = [row for row in summary["families"] if (row["set"], row["rank"]) == ("plain", "lossless")]
    most = max((row["size"] for row in families), default=0)
    return {(row["method"], row["space"]): row["score"] for row in families if row["size"] == most}


def main(demo: Path, quality: Path) -> None:
    """Write the table beside this file."""
    found = table(*(json.loads(path.read_text(encoding="utf-8")) for path in (demo, quality)))
    Path(__file__).with_name(FILE).write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
