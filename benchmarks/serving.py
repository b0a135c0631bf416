# SPDX-License-Identifier: Apache-2.0
"""Everything that a server with the plugin is asked about, on one server: stalls, time to first token, throughput, memory.

    python benchmarks/serving.py --shape 8b --out benchmarks/results/serving.json
    python benchmarks/serving.py --quick                                          # does it run here? also on a CPU

Parts, in the order in which they run:

`stall`       the phases of stall.py, written to stall.json beside --out
`ttft`        a merged adapter in a slot, and in the GPU cache but in no slot; cold, nothing merged, against vLLM's own cold load
              of an adapter of the resulting rank (those of `stall`, if it ran); 16 streams run meanwhile
`throughput`  tokens per second of 16 streams on a plain and on a merged adapter, of rank 16 and of rank 128
`stock`       the same beside vLLM alone on the same device: both start at once, with KV caches of equal size, and only one at a
              time is asked, in turn. Not among the parts that run unless named, and then `throughput` is one of its halves
`memory`      resident, pinned, allocated and reserved bytes over many merges of 50 recipes that do not fit together

The result is written after each part, and a part that fails does not keep the next from running.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import statistics
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import stall
from live import (
    ADAPTERS,
    KNOTS_TIES,
    LINEAR,
    RANK,
    STREAMS,
    SUM,
    Client,
    Place,
    Server,
    connected,
    facts,
    graph_options,
    parsed,
    save,
    server,
    server_arguments,
    streaming,
)
from plots import plot_serving, plot_stall
from shapes import SHAPES

PARTS = ("stall", "ttft", "throughput", "stock", "memory")
CACHED = 8  # artifacts asked in turn: more than the slots that the streams leave free
REPEATS = 20  # requests for each kind of artifact that is merged already
FIRST_LOADS = (
    5  # of vLLM's own; later ones are faster, in the pinned memory of adapters that had to leave (--max-cpu-loras)
)
MANY = 50  # recipes whose artifacts evict one another
WARM_UP_SECONDS = 1.5  # of each case of the throughput, before any is measured
WARM_UP = 0.2  # of the merges, before memory is looked at
FEWEST = 4  # samples of the memory, however late it is
Report = dict[str, Any]


class Serving:
    """The parts, on running servers. `report` is written to --out after each."""

    def __init__(self, place: Place, ours: Client, stock: Client | None, options: argparse.Namespace) -> None:
        self._place, self._ours, self._stock, self._options = place, ours, stock, options
        self._plain: set[tuple[Client, int]] = set()  # plain adapters that a server has
        self.report: Report = {
            **facts(place.shape, options.eager),
            "streams": STREAMS,
            "adapters": ADAPTERS,
            "first_token_seconds": {},
            "throughput": [],
            "memory": {},
        }

    async def run(self) -> bool:
        """Whether every part that was asked for came to its end."""
        whole = True
        asked = set(self._options.parts)
        for part in [name for name in PARTS if name in asked and not (name == "throughput" and "stock" in asked)]:
            started = time.monotonic()
            try:
                await getattr(self, part)()
            except Exception:  # whatever it was, the next part asks the servers anew
                traceback.print_exc()
                whole = False
            save(self._options.out, self.report)
            since = time.monotonic() - self._options.started
            print(f"{part} took {time.monotonic() - started:.0f} s, {since:.0f} s since the start", flush=True)
        return whole

    async def stall(self) -> None:
        """stall.py's phases; its cold requests and loads are those of `ttft`."""
        out = self._options.out.with_name("stall.json")
        rows = {
            row["phase"]: row["act_seconds"]
            for row in await stall.Stall(self._place, self._ours, self._options, out).run()
        }
        plot_stall(out)
        self.report["first_token_seconds"] |= {
            "cold_linear": rows["merge_linear"],
            "cold_knots_ties": rows["merge_knots_ties"],
            **own_loads(rows[f"vllm_load_r{SUM}"]),
        }

    async def ttft(self) -> None:
        """Seconds to the first token, by where the adapter is; and what the streams felt of those that needed no merge."""
        client, found = self._ours, self.report["first_token_seconds"]
        turn = [f"cached-{index}" for index in range(CACHED)]
        async with streaming(client, [client.server.name, "a0", "a1", "a2"], STREAMS) as streams:
            if "stall" not in self._options.parts:
                await self._cold()
            for model in turn:
                await client.first_token(model)
            in_turn = (turn * REPEATS)[:REPEATS]
            for name, models in (("in_cache", in_turn), ("in_slot", [in_turn[-1]] * REPEATS)):
                streams.phase = name
                found[name] = await seconds_of(client, models)
            streams.phase = None
            streams.check()
            self.report["gaps"] = [streams.row("in_slot"), streams.row("in_cache")]
        self.report["first_token"] = first_tokens(found)
        for name, value in self.report["first_token"].items():
            print(f"ttft {name:33} {value}", flush=True)
        for row in self.report["gaps"]:
            told = {key: row[key] for key in ("phase", "p50", "p99", "p999", "max", "n")}
            print(f"ttft gaps of the streams meanwhile   {told}", flush=True)

    async def _cold(self) -> None:
        """--cold requests of each kind, and as many loads of vLLM's own."""
        client, found, cold = self._ours, self.report["first_token_seconds"], range(self._options.cold)
        loads = []
        for index in cold:
            took = await client.load(f"own-{index}", self._place.plain(SUM))
            loads.append(round(took + await client.first_token(f"own-{index}"), 5))
        for kind, name in (("linear", "cold_linear"), ("knots-ties", "cold_knots_ties")):
            found[name] = await seconds_of(client, [f"{kind}-{index}" for index in cold])
        found |= own_loads(loads)

    async def throughput(self) -> None:
        await self._throughput([self._ours])

    async def stock(self) -> None:
        assert self._stock is not None
        await self._throughput([self._stock, self._ours])

    async def _throughput(self, clients: Sequence[Client]) -> None:
        """Rounds over all of it in random order, so that a drift of the device touches each alike."""
        for client in clients:
            for rank in (RANK, SUM):
                if (client, rank) not in self._plain:
                    await client.load(f"plain-{rank}", self._place.plain(rank))
                    self._plain.add((client, rank))
        cases = [
            (f"{'plugin idle' if client is self._ours else 'vLLM alone'}, plain rank {rank}", client, f"plain-{rank}")
            for rank in (RANK, SUM)
            for client in clients
        ]
        for rank, model in ((RANK, "rank16-0"), (SUM, "cached-0")):
            cases.append((f"plugin, merged rank {rank}", self._ours, model))
        for _, client, model in cases:  # so that nothing is merged, hashed or loaded in a window
            await tokens_per_second(client, model, WARM_UP_SECONDS)
        speeds: dict[str, list[float]] = {what: [] for what, _, _ in cases}
        order = random.Random(0)
        for _ in range(self._options.rounds):
            for what, client, model in order.sample(cases, len(cases)):
                speeds[what].append(await tokens_per_second(client, model, self._options.round_seconds))
            self.report["throughput"] = [
                {
                    "what": what,
                    "tokens_per_second": round(statistics.mean(values), 1),
                    "rounds": [round(value, 1) for value in values],
                }
                for what, values in speeds.items()
                if values
            ]
            save(self._options.out, self.report)
        mean = {row["what"]: row["tokens_per_second"] for row in self.report["throughput"]}
        self.report["throughput_ratios"] = throughput_ratios(mean)
        for name, value in (mean | self.report["throughput_ratios"]).items():
            print(f"throughput {name:45} {value}", flush=True)

    async def memory(self) -> None:
        """Ask 50 recipes in turn, whose artifacts evict one another, and look at the memory every few merges."""
        options, client = self._options, self._ours
        every = max(1, options.merges // 50)
        done, samples, before = [0], [await client.memory()], await self._merges()
        started = time.monotonic()
        for index in range(options.merges):
            await client.first_token(f"many-{index % MANY}")
            if (index + 1) % every == 0:
                done.append(index + 1)
                samples.append(await client.memory())
                self.report["memory"] = growth(done, samples)
                save(options.out, self.report)
                if time.monotonic() > options.started + options.seconds and len(done) >= FEWEST:
                    break
        seconds = (time.monotonic() - started) / done[-1]
        held = {name: round(value / 1e6) for name, value in samples[-1].items()}
        told = self.report["memory"]
        told["merged"] = await self._merges() - before
        told["held_at_the_end"] = (await client.get("/v1/merge/artifacts"))["data"]
        print(
            f"memory over requests {told['from_merge']} to {done[-1]} ({told['merged']} merges from the first on), "
            f"{seconds:.3f} s each: MB per merge {told['mb_per_merge']}; MB at the end {held}",
            flush=True,
        )

    async def _merges(self) -> int:
        """How many the first worker has made."""
        worker = (await self._ours.get("/v1/merge/artifacts"))["data"][0]
        return int(worker["merges"])


def own_loads(seconds: list[float]) -> dict[str, list[float]]:
    """vLLM's own loads, the first and the later ones."""
    first, later = seconds[:FIRST_LOADS], seconds[FIRST_LOADS:]
    return {"vllm_cold_load": first, **({"vllm_later_load": later} if later else {})}


async def seconds_of(client: Client, models: Sequence[str]) -> list[float]:
    """To the first token of a request for each, one after the other."""
    seconds = []
    for model in models:
        seconds.append(round(await client.first_token(model), 5))
        await asyncio.sleep(0.1)
    return seconds


async def tokens_per_second(client: Client, model: str, seconds: float) -> float:
    """Of streams that all ask one model, once they run."""
    async with streaming(client, [model], STREAMS) as streams:
        before, started = streams.tokens, time.perf_counter()
        await asyncio.sleep(seconds)
        streams.check()
        return (streams.tokens - before) / (time.perf_counter() - started)


def first_tokens(found: dict[str, list[float]]) -> Report:
    """{where the adapter is: median, least and most seconds}, and the ratios of medians that the goals are about."""
    medians = {name: statistics.median(values) for name, values in found.items()}
    loads = ("vllm_cold_load", "vllm_later_load")
    ratios = (("in_cache", "in_slot"), *((cold, load) for cold in ("cold_linear", "cold_knots_ties") for load in loads))
    return {
        name: {"median": round(median, 5), "least": min(found[name]), "most": max(found[name]), "n": len(found[name])}
        for name, median in medians.items()
    } | {
        f"{one}_over_{other}": round(medians[one] / medians[other], 3)
        for one, other in ratios
        if one in medians and other in medians
    }


def throughput_ratios(mean: dict[str, float]) -> dict[str, float]:
    """Of tokens per second, where both were measured."""
    pairs = [
        *((f"{case} rank {rank}", f"vLLM alone, plain rank {rank}") for rank in (RANK, SUM) for case in AGAINST_STOCK),
        *((f"plugin, merged rank {rank}", f"plugin idle, plain rank {rank}") for rank in (RANK, SUM)),
        *((f"{case} rank {SUM}", f"{case} rank {RANK}") for case in ("vLLM alone, plain", "plugin idle, plain")),
    ]
    return {
        f"{one} / {other}": round(mean[one] / mean[other], 4) for one, other in pairs if one in mean and other in mean
    }


AGAINST_STOCK = ("plugin idle, plain", "plugin, merged")


def growth(done: Sequence[int], samples: Sequence[dict[str, float]]) -> Report:
    """The bytes after `done` merges, and their slope (least squares, MB a merge) once the first 100, or fewer, are over."""
    start = min(100, int(WARM_UP * done[-1]))
    kept = [index for index, merges in enumerate(done) if merges >= start]
    x = np.array([done[index] for index in kept])
    series = {name: [sample[name] for sample in samples] for name in samples[0]}
    slopes = {
        name: round(float(np.polyfit(x, np.array(values)[kept], 1)[0]) / 1e6, 4) if len(kept) > 1 else None
        for name, values in series.items()
    }
    return {"merges": list(done), "bytes": series, "from_merge": start, "mb_per_merge": slopes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usual = [part for part in PARTS if part != "stock"]
    parser.add_argument("--parts", type=lambda text: text.split(","), default=usual, help=",".join(PARTS))
    stall.window_arguments(parser)
    parser.add_argument("--cold", type=int, default=10, help="cold requests of each kind, where `stall` does not run")
    parser.add_argument("--rounds", type=int, default=3, help="of the throughput windows")
    parser.add_argument("--round-seconds", type=float, default=6.0, help="of a throughput window")
    parser.add_argument("--merges", type=int, default=500, help="of `memory`")
    parser.add_argument("--seconds", type=float, default=900.0, help="since the start, after which `memory` ends early")
    parser.add_argument("--host-gib", type=float, default=2, help="VLLM_MERGE_HOST_BYTES, in GiB")
    parser.add_argument("--kv-gib", type=int, default=8, help="KV cache of each server, for `stock`")
    parser.add_argument("--out", type=Path, default=Path("serving.json"))
    server_arguments(parser, port=8775)
    options = parsed(parser)
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"unknown parts {', '.join(sorted(unknown))} (known: {', '.join(PARTS)})")
    with Place.made(SHAPES[options.shape]) as place:
        whole = asyncio.run(measure(place, options))
    plot_serving(options.out)
    if not whole:
        sys.exit(1)


async def measure(place: Place, options: argparse.Namespace) -> bool:
    """Start what the parts need, and measure; whether all of it came to its end."""
    own: dict[str, tuple[int, dict[str, Any]]] = {
        "cached": (CACHED, LINEAR),
        "rank16": (1, {**KNOTS_TIES, "rank": RANK}),
        "many": (MANY, LINEAR),
    }
    recipes = place.write_recipes({**stall.recipes(max(options.acts, options.cold)), **own})
    more = [*graph_options(options.eager), *options.server_options]
    if "stock" in options.parts:  # vLLM starts only where its share of the memory, of which this sees to all, is free
        more += ["--kv-cache-memory-bytes", str(options.kv_gib << 30), "--gpu-memory-utilization", "0.3"]
    budgets = {
        "VLLM_MERGE_CACHE_BYTES": str(int(options.cache_gib * 2**30)),
        "VLLM_MERGE_HOST_BYTES": str(int(options.host_gib * 2**30)),
    }
    async with contextlib.AsyncExitStack() as stack:
        running = [stack.enter_context(server(place, recipes, options.port, more, budgets))]
        if "stock" in options.parts:
            running.append(stack.enter_context(server(place, None, options.port + 1, more)))
        clients = [await client_of(one, stack) for one in running]
        print(f"up {time.monotonic() - options.started:.0f} s after the start", flush=True)
        return await Serving(place, clients[0], clients[1] if len(clients) > 1 else None, options).run()


async def client_of(running: Server, stack: contextlib.AsyncExitStack) -> Client:
    await running.up()
    return await stack.enter_async_context(connected(running))


if __name__ == "__main__":
    main()
