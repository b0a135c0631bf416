# SPDX-License-Identifier: Apache-2.0
"""What a killed process takes with it: a child hands over exposures and says when; it gets a SIGKILL; the store is read.

python benchmarks/experiment_loss.py [--kills 20] [--rate 2000] [--store PATH|URL] [--out benchmarks/results/experiment_loss.json]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from sqlalchemy import func, select

from vllm_merge.experiments.records import Exposure
from vllm_merge.experiments.store import Store
from vllm_merge.experiments.tables import exposures
from vllm_merge.experiments.writer import Writer

RESULTS = Path(__file__).parent / "results" / "experiment_loss.json"
GOAL_SECONDS = 0.2


def hand_over(url: str, name: str, rate: float) -> None:
    """The child: exposures at a steady rate, for ever; it says how many, and when the last one came."""
    writer = Writer(Store.open(url))
    number, start = 0, time.monotonic()
    while True:
        while (behind := start + number / rate - time.monotonic()) > 0:
            time.sleep(min(behind, 0.002))
        identity = f"{random.getrandbits(128):032x}"
        made = Exposure(
            identity, time.time(), name, 1, "a", "a@0123456789ab", "SPLIT", identity, "user", 200, seconds=0.5
        )
        writer.put(made)
        number += 1
        if number % 10 == 0:
            print(number, made.at, flush=True)


def one_kill(url: str, store: Store, name: str, rate: float) -> tuple[float, int, int]:
    """Of the exposures that were handed over: the seconds at their end of which none is in the store, how many those are, and how
    many are there.
    """
    command = [sys.executable, __file__, "--child", name, "--store", url, "--rate", str(rate)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        until = time.monotonic() + 2 + random.random()
        for line in child.stdout:
            number, last = line.split()
            if time.monotonic() > until and child.poll() is None:
                child.send_signal(signal.SIGKILL)  # what is in the pipe already is still read
    written = select(func.max(exposures.c.at), func.count()).where(exposures.c.experiment == name)
    with store.reading() as connection:
        at, count = connection.execute(written).one()
    return max(0.0, float(last) - at), max(0, int(number) - count), count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--rate", type=float, default=2000.0)
    parser.add_argument("--store")
    parser.add_argument("--child")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    if given.child:
        hand_over(given.store, given.child, given.rate)
    with tempfile.TemporaryDirectory() as folder:
        url = given.store or str(Path(folder) / "experiments.sqlite")
        store = Store.open(url)
        found = [one_kill(url, store, f"kill-{index}", given.rate) for index in range(given.kills)]
        store.close()
    lost = sorted(seconds for seconds, _, _ in found)
    content = {
        "date": datetime.now(UTC).date().isoformat(),
        "load": os.getloadavg()[0],
        "cores": os.cpu_count(),
        "rate": given.rate,
        "kills": given.kills,
        "written": sum(count for _, _, count in found),
        "most_exposures_lost": max(count for _, count, _ in found),
        "median_seconds_lost": lost[len(lost) // 2],
        "most_seconds_lost": lost[-1],
        "goal_seconds": GOAL_SECONDS,
    }
    print(json.dumps(content, indent=1))
    given.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
