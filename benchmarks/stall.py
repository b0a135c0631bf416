# SPDX-License-Identifier: Apache-2.0
"""What running requests feel of a merge: inter-token gaps of streams on a real server while adapters are merged or loaded.

    python benchmarks/stall.py --shape 8b --out benchmarks/results/stall.json
    python benchmarks/stall.py --quick                                            # does it run here? also on a CPU

Starts a vLLM server with dummy weights of the shape and eight random adapters of rank 16, and records the time between
tokens of 16 streams (base and adapters mixed): idle; request-time merges of each kind (every recipe is new: cold, then used
once); idle again, all in windows of equal length. In windows of a third, with a third of the acts: requests for an artifact that
is served already (what any new request costs the streams, merge or not), and vLLM's own loading of an adapter of rank 16 and of
the merges' rank. A new prompt takes a step of its own length: with fewer than one act in 140 steps such steps are not the 99th
percentile. The streams start anew for each window, so that all of them see contexts of the same length. In a window the requests start evenly, or back to back
where one takes longer than its share, and then the window is up to twice as long; those under way at its end are waited for,
and their gaps count. The files are in the page cache. The result is written after every phase.
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
    STREAMS,
    SUM,
    Client,
    Place,
    connected,
    facts,
    graph_options,
    parsed,
    save,
    server,
    server_arguments,
    streaming,
)
from plots import plot_stall
from shapes import SHAPES

SERVED = "served_requests"
SHORT = 3  # which part of a window, and of the acts, what no goal's quantiles are about gets
Act = Callable[[int], Awaitable[float]]
Row = dict[str, Any]


class Stall:
    """The phases, on a running server. `report` is written to `out` after each."""

    def __init__(self, place: Place, client: Client, options: argparse.Namespace, out: Path) -> None:
        self._place, self._client = place, client
        self._window, self._acts, self._out = options.window, options.acts, out
        self.report: dict[str, Any] = {
            **facts(place.shape, options.eager),
            "streams": STREAMS,
            "unit": "milliseconds between tokens",
            "rows": [],
        }

    async def run(self) -> list[Row]:
        """The rows, in the order of what the goals need most."""
        async with self._streaming():
            await asyncio.sleep(2)  # what runs for the first time
        await self._phase("idle", None)
        await self._client.first_token("linear-0")
        await self._phase(SERVED, lambda index: self._client.first_token("linear-0"), SHORT)
        await self._phase("merge_linear", self._merge("linear", first=1))  # linear-0 is served already
        await self._phase("merge_knots_ties", self._merge("knots-ties", first=0))
        await self._phase("vllm_load_r128", self._load(SUM), SHORT)
        await self._phase("vllm_load_r16", self._load(RANK), SHORT)
        await self._phase("idle_again", None)
        await self._merges()
        rows: list[Row] = self.report["rows"]
        return rows

    def _streaming(self) -> Any:
        return streaming(self._client, [self._client.server.name, "a0", "a1", "a2"], STREAMS)

    def _merge(self, kind: str, first: int) -> Act:
        return lambda index: self._client.first_token(f"{kind}-{index + first}")

    def _load(self, rank: int) -> Act:
        async def load(index: int) -> float:
            name = f"v{rank}-{index}"
            took = await self._client.load(name, self._place.plain(rank))
            return took + await self._client.first_token(name)

        return load

    async def _phase(self, name: str, act: Act | None, part: int = 1) -> None:
        """One window, or the `part`-th of one. The seconds of every act are until its first token."""
        window = self._window / part
        async with self._streaming() as streams:
            streams.phase = name
            started = time.perf_counter()
            seconds = [] if act is None else await self._evenly(act, started, window, -(-self._acts // part))
            await asyncio.sleep(max(0.0, started + window - time.perf_counter()))
            lasted = time.perf_counter() - started
            streams.phase = None
            streams.check()
        row = {
            **streams.row(name),
            "window_seconds": round(lasted, 2),
            "acts": len(seconds),
            "act_seconds": [round(value, 4) for value in seconds],
        }
        rows = self.report["rows"]
        rows.append(row)
        self.report["against_idle"] = against(rows, "idle")
        self.report["against_served_requests"] = against(rows, SERVED)
        save(self._out, self.report)
        told = {key: value for key, value in row.items() if key not in ("act_seconds", "phase", "by_length", "slow")}
        print(f"stall {name:17} {told} first tokens {row['act_seconds'][:3]} … {row['act_seconds'][-3:]}", flush=True)
        for base in ("idle", SERVED):
            if values := self.report[f"against_{base}"].get(name):
                print(f"      {'':17} against {base}: {values}", flush=True)

    async def _evenly(self, act: Act, started: float, window: float, acts: int) -> list[float]:
        """The seconds of these acts spread over the window, or of as many as begin within twice the window."""
        seconds: list[float] = []
        for index in range(acts):
            await asyncio.sleep(max(0.0, started + index * window / acts - time.perf_counter()))
            if time.perf_counter() > started + 2 * window:
                break
            seconds.append(await act(index))
        return seconds

    async def _merges(self) -> None:
        """The seconds that the merges themselves took, as the server tells them."""
        recipes = (await self._client.get("/v1/merge/recipes"))["data"]
        merged = [row for row in recipes if row["kind"] == "recipe" and row.get("seconds")]
        self.report["merge_seconds"] = {
            kind: sorted(round(row["seconds"], 4) for row in merged if row["name"].startswith(kind))
            for kind in ("linear", "knots-ties")
        }
        self.report["rank"] = max((row["rank"] for row in merged), default=None)
        save(self._out, self.report)


def against(rows: list[Row], base: str) -> dict[str, dict[str, float]]:
    """{later phase: p99 and p99.9 over those of `base`, and the longest gap less that of `base`, in milliseconds}; nothing
    before `base` has run. added_over_load: that of a merge over that of vLLM's own load of the resulting rank, once there is one.
    """
    start = next((index for index, row in enumerate(rows) if row["phase"] == base), None)
    if start is None:
        return {}
    bottom = rows[start]
    found = {
        row["phase"]: {
            "p99": round(row["p99"] / bottom["p99"], 3),
            "p999": round(row["p999"] / bottom["p999"], 3),
            "added": round(row["max"] - bottom["max"], 2),
        }
        for row in rows[start + 1 :]
    }
    load = found.get(f"vllm_load_r{SUM}", {}).get("added", 0.0)
    for phase, values in found.items():
        if phase.startswith("merge_") and load > 0:
            values["added_over_load"] = round(values["added"] / load, 3)
    return found


def recipes(acts: int) -> dict[str, tuple[int, dict[str, Any]]]:
    """What the phases ask for, as Place.write_recipes takes it."""
    return {"linear": (acts + 1, LINEAR), "knots-ties": (acts, KNOTS_TIES)}


def window_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--window", type=float, default=40.0, help="seconds of every window in which streams are watched"
    )
    parser.add_argument("--acts", type=int, default=24, help="merges, or loads, in a window")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    window_arguments(parser)
    parser.add_argument("--out", type=Path, default=Path("stall.json"))
    server_arguments(parser, port=8765)
    options = parsed(parser)
    with Place.made(SHAPES[options.shape]) as place:
        asyncio.run(measure(place, options))
    plot_stall(options.out)


async def measure(place: Place, options: argparse.Namespace) -> None:
    """Start the server and run the phases."""
    more = [*graph_options(options.eager), *options.server_options]
    budget = {"VLLM_MERGE_CACHE_BYTES": str(int(options.cache_gib * 2**30))}
    with server(place, place.write_recipes(recipes(options.acts)), options.port, more, budget) as running:
        await running.up()
        print(f"server up after {time.monotonic() - options.started:.0f} s", flush=True)
        async with connected(running) as client:
            rows = await Stall(place, client, options, options.out).run()
    print(f"idle again over idle: {against(rows, 'idle')['idle_again']}")


if __name__ == "__main__":
    main()
