# SPDX-License-Identifier: Apache-2.0
"""How long `vllm-merge search --auto` with 30 candidates takes on the demo, and what it finds.

    python benchmarks/search_demo.py

Starts a server with the demo's model and configs/demo.yaml, searches on examples/demo/validation.jsonl while a client asks for
`weighted` all the time, then measures the best and the file's recipes on the held-out prompts of eval.jsonl. Writes
benchmarks/results/search_demo.json.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "examples" / "demo"
RESULTS = ROOT / "benchmarks" / "results" / "search_demo.json"
sys.path.insert(0, str(DEMO))

from server import merge_serve, running  # noqa: E402  (a neighbour of the demo's scripts, not a package)

from vllm_merge.evaluation.scores import score  # noqa: E402
from vllm_merge.evaluation.server import Server  # noqa: E402
from vllm_merge.evaluation.tasks import read_tasks  # noqa: E402

CANDIDATES = 30
TOKENS = 16
LIMITS = "count=40,rate=240"  # of ad-hoc merges: by default a search waits for those


class Traffic:
    """A client that asks for one model, one request after another, and counts seconds and failures."""

    def __init__(self, url: str, model: str) -> None:
        self._url, self._model, self._stop = url, model, threading.Event()
        self.seconds: list[float] = []
        self.failures: list[str] = []
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Traffic:
        self._thread.start()
        return self

    def __exit__(self, *arguments: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        body = {"model": self._model, "prompt": "upper: city ->", "max_tokens": TOKENS, "temperature": 0}
        headers = {"content-type": "application/json"}
        while not self._stop.is_set():
            request = urllib.request.Request(f"{self._url}/v1/completions", json.dumps(body).encode(), headers)
            began = time.perf_counter()
            try:
                with urllib.request.urlopen(request, timeout=120) as reply:
                    reply.read()
                self.seconds.append(time.perf_counter() - began)
            except OSError as error:
                self.failures.append(str(error))
            self._stop.wait(0.1)

    def summary(self) -> dict[str, Any]:
        """Requests, failures, and seconds of a request at the median and the 99th percentile."""
        ordered = sorted(self.seconds)
        return {
            "requests": len(ordered),
            "failures": self.failures,
            "median_seconds": round(ordered[len(ordered) // 2], 4),
            "p99_seconds": round(ordered[int(0.99 * (len(ordered) - 1))], 4),
        }


def held_out(url: str, model: str) -> dict[str, Any]:
    """The accuracy on the prompts that nothing was chosen on."""
    examples = read_tasks(DEMO / "eval.jsonl")
    answers = Server(url, TOKENS).answers(model, [example.prompt for example in examples], lambda done: None)
    found = score(model, "recipe", examples, answers)
    return {"mean": found.mean.accuracy, "low": found.mean.low, "high": found.mean.high, "examples": found.mean.total}


def main() -> None:
    options = ("--max-loras", "4", "--max-lora-rank", "64")
    environment = {"VLLM_MERGE_ADHOC": LIMITS, "VLLM_MERGE_ADMIN_TOKEN": "benchmark"}
    with (
        tempfile.TemporaryDirectory() as folder,
        running(merge_serve(DEMO / "model", ROOT / "configs" / "demo.yaml", *options), environment) as server,
    ):
        with Traffic(server.url, "weighted") as before:
            time.sleep(10)
        load = os.getloadavg()
        command = [sys.executable, "-m", "vllm_merge", "search", "--server", server.url, "--auto", "--json"]
        command += [
            "--data",
            str(DEMO / "validation.jsonl"),
            "--candidates",
            str(CANDIDATES),
            "--max-tokens",
            str(TOKENS),
        ]
        command += ["--log", f"{folder}/log.jsonl", "-o", f"{folder}/found.yaml", "--promote", "assistant"]
        began = time.monotonic()
        with Traffic(server.url, "weighted") as during:
            done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
        seconds = time.monotonic() - began
        print(done.stderr, file=sys.stderr)
        facts = json.loads(done.stdout)
        best = "assistant" if facts["promoted"] else None
        results = {
            "candidates": CANDIDATES,
            "seconds": round(seconds, 1),
            "candidates_per_minute": round(60 * CANDIDATES / seconds, 1),
            "requests": facts["requests"],
            "failed": [row["failed"] for row in facts["candidates"] if row["failed"]],
            "best": facts["best"],
            "assistant_before": facts["against"],
            "promoted": facts["promoted"],
            "held_out": {name: held_out(server.url, name) for name in (best, "weighted", "knots-ties") if name},
            "traffic": {"before": before.summary(), "during": during.summary()},
            "ranking": [
                {"recipe": row["recipe"], "rung": row["rung"], "mean": row["estimates"]["mean"]}
                for row in facts["candidates"]
                if row["estimates"]
            ],
            "rungs": facts["rungs"],
            "load_average_at_start": [round(value, 1) for value in load],
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, shared with other work",
            "versions": {name: version(name) for name in ("vllm-merge", "torch")},
        }
    RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(
        json.dumps(
            {k: results[k] for k in ("seconds", "candidates_per_minute", "requests", "held_out", "traffic")}, indent=1
        )
    )


if __name__ == "__main__":
    main()
