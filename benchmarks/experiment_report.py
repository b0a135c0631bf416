# SPDX-License-Identifier: Apache-2.0
"""How long a report, a look at the guardrails and a write take, with a million exposures in an SQLite store.

python benchmarks/experiment_report.py [--exposures 1000000] [--out benchmarks/results/experiment_report.json]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vllm_merge.experiments.guardrails import breaches
from vllm_merge.experiments.records import Definition, Exposure, Outcome
from vllm_merge.experiments.report import report
from vllm_merge.experiments.running import follow
from vllm_merge.experiments.store import Store
from vllm_merge.recipe.experiments import Experiment

RESULTS = Path(__file__).parent / "results" / "experiment_report.json"
ARMS = ("support", "support-v2", "support-v3")
BATCH = 500  # the writer's largest
TIMED = 40  # batches of that size, whose writing is timed; the others are ten times as large
DAYS = 14
GOAL_SECONDS = 5.0
EXPERIMENT = {
    "arms": dict.fromkeys(ARMS, 1),
    "primary": {"metric": "score"},
    "guardrails": [
        {"metric": "errors", "max_increase": 0.5},
        {"metric": "first_token", "quantile": 0.99, "max_increase": 0.2},
        {"metric": "length", "max_increase": 0.3},
        {"metric": "refusals", "max": 0.05},
    ],
}


def traffic(count: int, users: int | None, seed: int = 0) -> Iterator[tuple[list[Exposure], list[Outcome]]]:
    """Batches of exposures over two weeks, and outcomes of a third of them. users: few of them do much; None: requests are units."""
    draw = random.Random(seed)
    start = time.time() - DAYS * 86_400
    arms = [draw.choice(ARMS) for _ in range(users or 0)]
    ends = [min(BATCH * (index + 1), count) for index in range(TIMED)]
    ends += range(ends[-1] + 10 * BATCH, count + 10 * BATCH, 10 * BATCH)
    done = 0
    for end in ends:
        exposures, outcomes = [], []
        first, done = done, min(end, count)
        for index in range(first, done):
            user = int(users * draw.random() ** 2) if users else None
            arm = arms[user] if user is not None else draw.choice(ARMS)
            identity = f"{draw.getrandbits(128):032x}"
            made = Exposure(
                id=identity,
                at=start + DAYS * 86_400 * index / count,
                experiment="assistant-ab",
                version=1,
                arm=arm,
                artifact=f"{arm}@0123456789ab",
                reason="SPLIT",
                unit=f"{user * 0x9E3779B97F4A7C15 & (1 << 128) - 1:032x}" if user is not None else "",
                unit_kind="user" if users else "request",
                status=200 if draw.random() > 0.01 else 500,
                finish="stop",
                prompt_tokens=draw.randint(10, 2000),
                completion_tokens=draw.randint(1, 500),
                first_token=draw.lognormvariate(-2.0, 0.5),
                gap_mean=draw.lognormvariate(-4.0, 0.2),
                gap_p99=0.05,
                gap_max=0.1,
                seconds=draw.lognormvariate(0.5, 0.6),
                streaming=True,
            )
            exposures.append(made)
            if draw.random() < 1 / 3:
                score = draw.random() + 0.02 * ARMS.index(arm)
                outcomes.append(
                    Outcome(
                        f"o{identity}", made.at + 5, "assistant-ab", "score", score, "", identity, 1, arm, made.cluster
                    )
                )
        yield exposures, outcomes


def measure(path: Path, count: int, users: int | None) -> dict[str, Any]:
    store = Store.open(str(path))
    experiment = Experiment.model_validate(EXPERIMENT)
    artifacts = {arm: f"{arm}@0123456789ab" for arm in ARMS}
    definition = store.define("assistant-ab", follow("assistant-ab", experiment, artifacts, None).to_document())
    outcomes_written, processor, wall = 0, 0.0, 0.0
    for number, (exposures, outcomes) in enumerate(traffic(count, users)):
        cpu, now = time.process_time(), time.perf_counter()
        store.add_exposures(exposures)
        if number < TIMED:
            processor, wall = processor + time.process_time() - cpu, wall + time.perf_counter() - now
        store.add_outcomes(outcomes)
        outcomes_written += len(outcomes)
    store.close()
    return {
        "exposures": count,
        "outcomes": outcomes_written,
        "units": users or count,
        "bytes": sum(part.stat().st_size for part in path.parent.glob(f"{path.name}*")),
        "write_microseconds_each": 1e6 * wall / min(count, TIMED * BATCH),
        "write_processor_microseconds_each": 1e6 * processor / min(count, TIMED * BATCH),
        **_reads(path, definition),
    }


def _reads(path: Path, definition: Definition) -> dict[str, Any]:
    """A new connection each, as the command has; the best of three."""

    def timed(action: Callable[[Store], Any]) -> tuple[float, float, Any]:
        found = []
        for _ in range(3):
            store = Store.open(str(path), create=False)
            cpu, now = time.process_time(), time.perf_counter()
            result = action(store)
            found.append((time.perf_counter() - now, time.process_time() - cpu, result))
            store.close()
        return min(found, key=lambda one: one[0])

    seconds, processor, facts = timed(lambda store: report(store, "assistant-ab"))
    look, look_processor, _ = timed(lambda store: breaches(store, definition))
    return {
        "report_seconds": seconds,
        "report_processor_seconds": processor,
        "guardrails_seconds": look,
        "guardrails_processor_seconds": look_processor,
        "goal_seconds": GOAL_SECONDS,
        "verdict": facts["verdict"]["sentence"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--exposures", type=int, default=1_000_000)
    parser.add_argument("--users", type=int, default=20_000)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    rows = []
    for users in (given.users, None):
        with tempfile.TemporaryDirectory() as folder:
            row = {"case": "users" if users else "every request its own unit"}
            row |= measure(Path(folder) / "experiments.sqlite", given.exposures, users)
        rows.append(row)
        print(json.dumps(row), flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    content = {
        "date": datetime.now(UTC).date().isoformat(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "peak_kilobytes": peak,
        "rows": rows,
    }
    given.out.write_text(json.dumps(content, indent=1) + "\n")
    print(f"wrote {given.out}")


if __name__ == "__main__":
    main()
