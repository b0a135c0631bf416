# SPDX-License-Identifier: Apache-2.0
"""How often the statistics of experiments are wrong, and how often they find what is there, over many simulated experiments.

python benchmarks/experiment_statistics.py [--runs 2000] [--out benchmarks/results/experiment_statistics.json]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import experiment_simulations as simulations

RESULTS = Path(__file__).parent / "results" / "experiment_statistics.json"


def jobs(runs: int) -> Iterator[Callable[[], dict[str, Any]]]:
    for case in simulations.CASES:
        yield lambda case=case: simulations.false_positives(case, runs, 2000)
    yield lambda: simulations.false_positives(simulations.CASES[0], runs, 2000, arms=4)
    yield lambda: simulations.returning_units(runs)
    for level in (0.5, 0.99):
        for clustered in (False, True):
            yield lambda level=level, clustered=clustered: simulations.quantiles(level, runs, clustered)
    for lost in (0.0, 0.05, 0.2):
        yield lambda lost=lost: simulations.ratio_mismatch(runs, lost=lost)
    for effect in (0.1, 0.3):
        yield lambda effect=effect: simulations.power(effect, max(1, runs // 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    rows = []
    for job in jobs(given.runs):
        started = time.perf_counter()
        row = job()
        rows.append(row)
        figures = ", ".join(f"{key} {value:.4g}" for key, value in row.items() if isinstance(value, float))
        print(f"{row['case']}: {figures} ({time.perf_counter() - started:.1f} s)", flush=True)
    content = {"date": datetime.now(UTC).date().isoformat(), "rows": rows}
    given.out.write_text(json.dumps(content, indent=1) + "\n")
    print(f"wrote {given.out}")


if __name__ == "__main__":
    main()
