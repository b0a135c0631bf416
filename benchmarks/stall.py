# SPDX-License-Identifier: Apache-2.0
"""What running requests feel of a merge: inter-token gaps of streams on a real server while adapters are merged or loaded.

    python benchmarks/stall.py --shape 8b --out benchmarks/results/stall.json

Starts a vLLM server with dummy weights of the shape and eight random adapters of rank 16, keeps 16 streams running (base
and adapters mixed), and records the time between tokens of every stream in windows of equal length: idle, requests for an
artifact that is served already (what any new request costs the streams, merge or not), request-time merges of each kind (every recipe is new: cold, then used once), vLLM's own loading of an adapter of rank 16 and of the
merges' rank, idle again. In a window the merges (or loads) start evenly, or back to back where one takes longer than its
share; those under way at the end are waited for, and their gaps count. The files are in the page cache. The result is
written after every phase.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from live import (
    KNOTS_TIES,
    LINEAR,
    RANK,
    SUM,
    Client,
    Place,
    Server,
    Streams,
    connected,
    facts,
    save,
    server,
    streaming,
)
from plots import plot_stall
from shapes import SHAPES

STREAMS = 16
Act = Callable[[int], Awaitable[float]]


class Stall:
    """The phases, on a running server."""

    def __init__(
        self, place: Place, client: Client, streams: Streams, options: argparse.Namespace, report: dict[str, Any]
    ) -> None:
        self._place, self._client, self._streams = place, client, streams
        self._window, self._acts, self._out = options.window, options.acts, options.out
        self.report = report

    async def run(self) -> None:
        await self._phase("idle", None)
        await self._client.first_token("linear-0")
        await self._phase("served_requests", lambda index: self._client.first_token("linear-0"))
        await self._phase("merge_linear", self._merge("linear"))
        await self._phase("merge_knots_ties", self._merge("knots-ties"))
        await self._phase("vllm_load_r16", self._load(RANK))
        await self._phase("vllm_load_r128", self._load(SUM))
        await self._phase("idle_again", None)

    def _merge(self, kind: str) -> Act:
        first = 1 if kind == "linear" else 0  # linear-0 is served already
        return lambda index: self._client.first_token(f"{kind}-{index + first}")

    def _load(self, rank: int) -> Act:
        async def load(index: int) -> float:
            name = f"v{rank}-{index}"
            took = await self._client.load(name, self._place.plain(rank))
            await self._client.first_token(name)
            return took

        return load

    async def _phase(self, name: str, act: Act | None) -> None:
        """One window. The seconds of every act are until the first token of a merge, or of the load alone."""
        self._streams.phase = name
        started = time.perf_counter()
        seconds: list[float] = []
        for index in range(self._acts if act is not None else 0):
            wait = started + index * self._window / self._acts - time.perf_counter()
            if wait > 0:
                await asyncio.sleep(wait)
            if act is None or time.perf_counter() > started + self._window:
                break
            seconds.append(await act(index))
        await asyncio.sleep(max(0.0, started + self._window - time.perf_counter()))
        lasted = time.perf_counter() - started
        self._streams.check()
        self._streams.phase = "between"
        row = {
            **self._streams.row(name),
            "window_seconds": round(lasted, 2),
            "acts": len(seconds),
            "act_seconds": [round(value, 4) for value in seconds],
        }
        self.report["rows"].append(row)
        self.report["against_idle"] = against_idle(self.report["rows"])
        print({key: value for key, value in row.items() if key != "act_seconds"}, row["act_seconds"][:6], flush=True)
        save(self._out, self.report)
        await asyncio.sleep(1)


def against_idle(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """{phase: p99 and p99.9 over those of idle, and the longest gap less idle's, in milliseconds}; added_over_load: that of a
    merge over that of vLLM's own load of the resulting rank, once there is one.
    """
    idle = rows[0]
    found = {
        row["phase"]: {
            "p99": round(row["p99"] / idle["p99"], 3),
            "p999": round(row["p999"] / idle["p999"], 3),
            "added": round(row["max"] - idle["max"], 2),
        }
        for row in rows[1:]
    }
    load = found.get("vllm_load_r128", {}).get("added", 0.0)
    for phase, values in found.items():
        if phase.startswith("merge_") and load > 0:
            values["added_over_load"] = round(values["added"] / load, 3)
    return found


async def measure(place: Place, running: Server, options: argparse.Namespace, report: dict[str, Any]) -> None:
    """All phases on a running server."""
    await running.up()
    print(f"server up after {time.monotonic() - options.started:.0f} s", flush=True)
    async with (
        connected(running) as client,
        streaming(client, [running.name, "a0", "a1", "a2"], STREAMS) as streams,
    ):
        await asyncio.sleep(options.settle)
        await Stall(place, client, streams, options, report).run()
        names = (await client.get("/v1/merge/recipes"))["data"]
    merged = [row for row in names if row["kind"] == "recipe" and row.get("seconds")]
    report["merge_seconds"] = {
        kind: sorted(round(row["seconds"], 4) for row in merged if row["name"].startswith(kind))
        for kind in ("linear", "knots-ties")
    }
    report["rank"] = max((row["rank"] for row in merged), default=None)
    save(options.out, report)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--window", type=float, default=40.0, help="seconds of every phase")
    parser.add_argument("--acts", type=int, default=24, help="merges, or loads, in a window")
    parser.add_argument("--settle", type=float, default=5.0, help="seconds of streaming before the first phase")
    parser.add_argument("--out", type=Path, default=Path("stall.json"))
    parser.add_argument("--cache-gib", type=float, default=16, help="VLLM_MERGE_CACHE_BYTES, in GiB")
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs")
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("server_options", nargs="*", help="further options for vLLM, after --")
    options = parser.parse_args()
    with Place.made(SHAPES[options.shape]) as place:
        report = serve_and_measure(place, options)
    print(f"idle again over idle: {report['against_idle']['idle_again']}")
    plot_stall(options.out)


def serve_and_measure(place: Place, options: argparse.Namespace) -> dict[str, Any]:
    """Start the server and measure; the report."""
    recipes = place.write_recipes({"linear": (options.acts + 1, LINEAR), "knots-ties": (options.acts, KNOTS_TIES)})
    more = [*(["--enforce-eager"] if options.eager else []), *options.server_options]
    options.started = time.monotonic()
    report: dict[str, Any] = {
        **facts(place.shape, options.eager),
        "streams": STREAMS,
        "unit": "milliseconds between tokens",
        "rows": [],
    }
    budget = {"VLLM_MERGE_CACHE_BYTES": str(int(options.cache_gib * 2**30))}
    with server(place, recipes, options.port, more, budget) as running:
        asyncio.run(measure(place, running, options, report))
    return report


if __name__ == "__main__":
    main()
