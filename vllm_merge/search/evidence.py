# SPDX-License-Identifier: Apache-2.0
"""What is known of the methods before a search: `--auto` begins with what kept most where it was measured.

evidence.json is made from recorded results, and from nothing else:

    python -m vllm_merge.search.evidence benchmarks/results/demo-methods.json

Of each method and space it keeps the best row over all adapters: the share that the merge kept, and the size it had then, which
is its λ over the λ at which the result is as large as the sum of the adapters.
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
    """kept: the share of what the adapters get right that the merge gets right. size: of the result, 1 as large as the sum."""

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


def table(results: Mapping[str, Any]) -> dict[str, Any]:
    """What evidence.json says of recorded results (demo-methods.json)."""
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
    rows = sorted(best.values(), key=lambda row: (-row.kept, row.method))
    return {
        "from": "benchmarks/results/demo-methods.json",
        "what": f"the demo's model with {most} adapters; kept: mean share of the adapters' own accuracy on held-out prompts; "
        "size: chosen λ over the λ at which the result is as large as the sum",
        "methods": [{"method": r.method, "space": r.space, "kept": r.kept, "size": r.size} for r in rows],
    }


def main(path: Path) -> None:
    """Write the table beside this file."""
    found = table(json.loads(path.read_text(encoding="utf-8")))
    Path(__file__).with_name(FILE).write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
