# SPDX-License-Identifier: Apache-2.0
"""What an experiment costs a request: the assignment, the middleware under load, and time to first token on a real server.

    python benchmarks/experiments_load.py [--server] --out benchmarks/results/experiments_load.json

assignment   one call of the assigner, and everything that is done for a request (headers, unit, lot, ticket).
middleware   a stub application that answers at once, asked at 2,000 requests a second in one process: alone, through the
             middleware with a plain name, and through it with an experiment whose exposures go to an SQLite store. The three
             take turns request by request, so that they see the same machine. What is added is the difference of the p99s,
             from when a request was due, so that waiting behind others counts.
server       (--server) a real vLLM server on this machine's CPU at half the rate that it can do: streams of one recipe by its
             own name and by the name of an experiment whose arms are all that recipe, in turns. Time to first token, with a
             bootstrap interval of the difference of the medians.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples" / "demo")]

RATE = 2000.0  # requests a second
BODY = {"model": "m", "prompt": "Tell me about " + "merging adapters, " * 20, "max_tokens": 16, "user": "user-0"}


def quantiles(seconds: list[float], unit: float) -> dict[str, float]:
    values = np.asarray(seconds) * unit
    return {
        name: round(float(np.quantile(values, q)), 4) for name, q in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))
    } | {"mean": round(float(values.mean()), 4)}


# -- the assignment ------------------------------------------------------------------------------------------------------


def running(arms: int = 3) -> Any:
    from vllm_merge.experiments.running import follow
    from vllm_merge.recipe.experiments import Experiment

    experiment = Experiment.model_validate(
        {
            "arms": {f"arm-{i}": 1 for i in range(arms)},
            "unit": "user",
            "holdout": 0.05,
            "namespace": {"name": "chat", "range": [0, 1]},
        }
    )
    return follow("assistant-ab", experiment, {f"arm-{i}": f"arm-{i}@0123456789ab" for i in range(arms)}, None)


def played() -> Any:
    """Experiments of an API process, with one that runs and a front door that knows its arms."""
    from vllm_merge.serving.control.names import Name
    from vllm_merge.serving.experiments.experiments import Experiments
    from vllm_merge.serving.experiments.trials import Trials

    names = {f"arm-{i}": Name(f"arm-{i}", "recipe", str(i) * 64, f"arm-{i}@0123456789ab") for i in range(3)}
    names["assistant-ab"] = Name("assistant-ab", "experiment", "0" * 64, "arm-0@0123456789ab")
    front = Front(names)
    experiments = Experiments(front, lambda: "base")  # type: ignore[arg-type]
    experiments.adopt(Trials({"assistant-ab": running()}))
    return experiments


class Front:
    """What the middleware asks of the front door, without workers."""

    def __init__(self, names: dict[str, Any]) -> None:
        self.names = names
        self.artifacts = {name.digest: name.label for name in names.values()}

    def known(self, name: str) -> Any:
        return self.names.get(name)

    def owns(self, path: str) -> bool:
        return True

    @contextlib.asynccontextmanager
    async def hold(self, artifact: Any, label: str, *, wait: bool = True) -> AsyncIterator[None]:
        yield


def assignment(calls: int = 20_000) -> dict[str, Any]:
    from vllm_merge.experiments.assignment import Assigner
    from vllm_merge.serving.requests.bodies import Asked

    assigner, experiments = Assigner(running()), played()
    alone, whole = [], []
    for i in range(calls):
        unit = f"user-{i:032d}"  # as long as a UUID
        started = time.perf_counter()
        assigner.assign(unit, 1.0)
        alone.append(time.perf_counter() - started)
        asked = Asked(
            scope("assistant-ab"), _nothing, json.dumps({**BODY, "model": "assistant-ab", "user": unit}).encode()
        )
        started = time.perf_counter()
        chosen = experiments.choose(asked)
        assert chosen is not None
        chosen.ticket()
        whole.append(time.perf_counter() - started)
    units = [f"user-{i:032d}" for i in range(calls)]
    cpu = time.thread_time()  # what other processes on the machine do not change
    for unit in units:
        assigner.assign(unit, 1.0)
    cpu = (time.thread_time() - cpu) / calls
    return {
        "calls": calls,
        "assign_us": quantiles(alone, 1e6),
        "assign_cpu_us": round(1e6 * cpu, 2),
        "choose_and_sign_us": quantiles(whole, 1e6),
    }


# -- the middleware ------------------------------------------------------------------------------------------------------


async def _nothing() -> dict[str, Any]:
    return {"type": "http.disconnect"}


def scope(model: str, app: Any = None) -> dict[str, Any]:
    return {
        "type": "http",
        "method": "POST",
        "path": "/v1/completions",
        "headers": [(b"content-type", b"application/json"), (b"host", b"server")],
        "query_string": b"",
        "app": app,
    }


async def stub(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Reads the body and answers at once, like vLLM would with a short completion."""
    await receive()
    body = json.dumps(
        {"id": "cmpl-0", "choices": [{"text": " fine", "finish_reason": "stop"}], "usage": {"prompt_tokens": 90}}
    ).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": body})


async def middleware(seconds: float) -> dict[str, Any]:
    """Requests are due every 1/RATE s, whether or not the one before has ended."""
    from vllm_merge.serving.requests.middleware import MergeMiddleware

    experiments = played()
    experiments.open_store()
    listed = {name: SimpleNamespace(lora_path="x") for name in experiments._front.names}
    listed |= {known.label: SimpleNamespace(lora_path="x") for known in experiments._front.names.values()}
    models = SimpleNamespace(lora_requests=listed, base_model_paths=[SimpleNamespace(name="base")])
    state = SimpleNamespace(
        vllm_merge=experiments._front, vllm_merge_experiments=experiments, openai_serving_models=models
    )
    app, wrapped = SimpleNamespace(state=state), MergeMiddleware(stub)  # type: ignore[arg-type]
    kinds = {"stub": (stub, "arm-0"), "plain_name": (wrapped, "arm-0"), "experiment": (wrapped, "assistant-ab")}
    taken: dict[str, list[float]] = {kind: [] for kind in kinds}
    worked: dict[str, list[float]] = {kind: [] for kind in kinds}

    async def one(kind: str, due: float, number: int) -> None:
        target, model = kinds[kind]
        body = json.dumps({**BODY, "model": model, "user": f"user-{number % 5000}"}).encode()
        sent = False

        async def receive() -> dict[str, Any]:
            nonlocal sent
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: dict[str, Any]) -> None:
            pass

        began = time.thread_time()
        await target(scope(model, app), receive, send)  # type: ignore[arg-type]
        worked[kind].append(time.thread_time() - began)  # nothing in it waits, so nothing else runs meanwhile
        taken[kind].append(time.perf_counter() - due)

    started, number, tasks = time.perf_counter(), 0, set()
    while (now := time.perf_counter()) - started < seconds:
        while started + number / RATE <= now:
            kind = list(kinds)[number % 3]
            task = asyncio.create_task(one(kind, started + number / RATE, number))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            number += 1
        await asyncio.sleep(0)
    await asyncio.gather(*tasks)
    writer = experiments.writer
    writer.close()
    found = {kind: quantiles(values, 1e3) for kind, values in taken.items()}
    return {
        "rate": round(number / seconds),
        "requests": number,
        "latency_ms": found,
        "cpu_ms": {kind: quantiles(values, 1e3) for kind, values in worked.items()},
        "added_p99_ms": {
            kind: round(found[kind]["p99"] - found["stub"]["p99"], 4) for kind in ("plain_name", "experiment")
        },
        "exposures": {"written": writer.written, "dropped": writer.dropped, "requests": len(taken["experiment"])},
    }


# -- a real server -------------------------------------------------------------------------------------------------------

CONFIG = """\
version: 1
adapters:
  sort: {{path: {demo}/adapters/sort}}
  upper: {{path: {demo}/adapters/upper}}
recipes:
  both: {{merge_method: task_arithmetic, adapters: [{{adapter: sort}}, {{adapter: upper}}]}}
experiments:
  ab:
    arms: {{one: {{serve: both, weight: 1}}, other: {{serve: both, weight: 1}}}}
    unit: user
"""


async def on_a_server(folder: Path, seconds: float) -> dict[str, Any]:
    from openai import AsyncOpenAI
    from server import merge_serve, running

    demo = ROOT / "examples" / "demo"
    config = folder / "ab.yaml"
    config.write_text(CONFIG.format(demo=demo))
    command = merge_serve(demo / "model", config, "--max-loras", "2", "--max-lora-rank", "64")
    with running(command, {"VLLM_MERGE_STORE": str(folder / "server.sqlite")}) as server:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:

            async def first_token(model: str, number: int) -> float:
                started = time.perf_counter()
                stream = await client.completions.create(
                    model=model, prompt=f"sort: word{number} ->", max_tokens=8, user=f"user-{number % 500}", stream=True
                )
                first = 0.0
                async for _ in stream:
                    first = first or time.perf_counter() - started
                return first

            for number in range(8):
                await first_token("ab" if number % 2 else "both", number)
            capacity = await _capacity(first_token)
            rate = capacity / 2
            taken: dict[str, list[float]] = {"recipe": [], "experiment": []}

            async def one(kind: str, number: int) -> None:
                taken[kind].append(await first_token("both" if kind == "recipe" else "ab", number))

            rng, started, number, tasks = np.random.default_rng(0), time.perf_counter(), 0, set()
            while time.perf_counter() - started < seconds:
                pair = ["recipe", "experiment"] if rng.random() < 0.5 else ["experiment", "recipe"]
                for kind in pair:
                    tasks.add(asyncio.create_task(one(kind, number)))
                    number += 1
                    await asyncio.sleep(max(0.0, started + number / rate - time.perf_counter()))
            await asyncio.gather(*tasks)
    found = {kind: quantiles(values, 1e3) for kind, values in taken.items()}
    low, difference, high = _difference(taken["recipe"], taken["experiment"])
    base = found["recipe"]["p50"]
    return {
        "capacity_per_s": round(capacity, 2),
        "rate_per_s": round(rate, 2),
        "requests": number,
        "first_token_ms": found,
        "added_to_the_median_percent": round(100 * difference / base, 3),
        "interval_95_percent": [round(100 * low / base, 3), round(100 * high / base, 3)],
    }


async def _capacity(first_token: Any, streams: int = 8, seconds: float = 8.0) -> float:
    """Requests a second when `streams` of them always run."""
    done, deadline = 0, time.perf_counter() + seconds

    async def loop(start: int) -> None:
        nonlocal done
        number = start
        while time.perf_counter() < deadline:
            await first_token("both", number)
            number += streams
            done += 1

    await asyncio.gather(*(loop(i) for i in range(streams)))
    return done / seconds


def _difference(one: list[float], other: list[float]) -> tuple[float, float, float]:
    """Of the medians in ms, with its 95 % bootstrap interval."""
    rng, a, b = np.random.default_rng(0), np.asarray(one) * 1e3, np.asarray(other) * 1e3
    drawn = [np.median(rng.choice(b, b.size)) - np.median(rng.choice(a, a.size)) for _ in range(2000)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(np.median(b) - np.median(a)), float(high)


def conditions() -> dict[str, Any]:
    return {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", action="store_true", help="also on a real vLLM server")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--server-seconds", type=float, default=60.0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    report: dict[str, Any] = {}
    if options.out is not None and options.out.exists():
        report = json.loads(options.out.read_text())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["VLLM_MERGE_STORE"] = str(folder / "store.sqlite")
        report["assignment"] = {**assignment(), "conditions": conditions()}
        report["middleware"] = {**asyncio.run(middleware(options.seconds)), "conditions": conditions()}
        if options.server:
            report["server"] = {**asyncio.run(on_a_server(folder, options.server_seconds)), "conditions": conditions()}
    text = json.dumps(report, indent=2)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
