# SPDX-License-Identifier: Apache-2.0
"""Time to first token, throughput and memory of a server that merges, against vLLM alone.

    python benchmarks/serving.py --shape 8b --out benchmarks/results/serving.json

Parts, on one server with the plugin and, for `throughput`, one of vLLM alone beside it on the same device (they start at
once, with KV caches of equal size, and only one at a time is asked):

`ttft`        a merged adapter in a slot; in the GPU cache but in no slot; cold, nothing merged; and vLLM's own cold load of
              an adapter of the resulting rank; 16 streams run meanwhile
`throughput`  tokens per second of 16 streams, in windows that alternate between the servers: a plain adapter of rank 16 and
              of rank 128, which both serve, and merged adapters of these ranks
`memory`      resident, pinned, allocated and reserved bytes over many merges of 50 recipes that do not fit together

The result is written after each part.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from live import (
    ADAPTERS,
    KNOTS_TIES,
    LINEAR,
    RANK,
    SUM,
    Client,
    Place,
    Server,
    connected,
    facts,
    save,
    server,
    streaming,
)
from plots import plot_serving
from shapes import SHAPES

PARTS = ("ttft", "throughput", "memory")
STREAMS = 16
CACHED = 8  # artifacts asked in turn: more than the slots that the streams leave free
MANY = 50  # recipes whose artifacts evict one another
WARM_UP = 0.2  # of the merges, before memory is looked at


def percentiles(seconds: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(seconds), 5),
        "least": round(min(seconds), 5),
        "most": round(max(seconds), 5),
        "n": len(seconds),
    }


async def ttft(place: Place, client: Client, options: argparse.Namespace, report: dict[str, Any]) -> None:
    """Seconds to the first token, by where the adapter is; cold ones in linear and KnOTS-TIES, up to --ttft-seconds."""
    found: dict[str, list[float]] = report["first_token_seconds"]
    deadline = time.monotonic() + options.ttft_seconds

    async def several(name: str, models: list[str]) -> None:
        for model in models:
            if name not in found or time.monotonic() < deadline:
                found.setdefault(name, []).append(round(await client.first_token(model), 5))
                await asyncio.sleep(0.1)

    async with streaming(client, [client.server.name, "a0", "a1", "a2"], options.streams):
        await asyncio.sleep(2)
        await several("cold_linear", [f"linear-{i}" for i in range(options.cold)])
        await several("cold_knots_ties", [f"knots-ties-{i}" for i in range(options.cold)])
        for index in range(options.cold):
            if "vllm_cold_load" in found and time.monotonic() > deadline:
                break
            took = await client.load(f"own-{index}", place.plain(SUM))
            took += await client.first_token(f"own-{index}")
            found.setdefault("vllm_cold_load", []).append(round(took, 5))
        turn = [f"cached-{i}" for i in range(CACHED)]
        for model in turn:
            await client.first_token(model)
        await several("in_cache", turn * 3)
        await client.first_token(turn[0])
        await several("in_slot", [turn[0]] * 20)
    medians = {name: statistics.median(values) for name, values in found.items()}
    report["first_token"] = {name: percentiles(values) for name, values in found.items()} | {
        "in_cache_over_in_slot": round(medians["in_cache"] / medians["in_slot"], 3),
        "cold_over_vllm_cold_load": round(medians["cold_knots_ties"] / medians["vllm_cold_load"], 3),
    }
    for name, values in report["first_token"].items():
        print(f"ttft {name:26} {values}", flush=True)


async def tokens_per_second(client: Client, model: str, options: argparse.Namespace) -> float:
    """Of streams that all ask one model, once they run."""
    async with streaming(client, [model], options.streams or STREAMS) as streams:
        await asyncio.sleep(1)
        before, started = streams.tokens, time.perf_counter()
        await asyncio.sleep(options.window)
        streams.check()
        return (streams.tokens - before) / (time.perf_counter() - started)


async def throughput(
    place: Place, ours: Client, stock: Client, options: argparse.Namespace, report: dict[str, Any]
) -> None:
    """Rounds over all of it in random order, so that a drift of the device touches each alike."""
    for client in (ours, stock):
        for rank in (RANK, SUM):
            await client.load(f"plain-{rank}", place.plain(rank))
    cases = [
        (f"{name}, plain rank {rank}", client, f"plain-{rank}")
        for rank in (RANK, SUM)
        for name, client in (("vLLM alone", stock), ("plugin idle", ours))
    ]
    cases += [("plugin, merged rank 16", ours, "rank16-0"), ("plugin, merged rank 128", ours, "cached-0")]
    speeds: dict[str, list[float]] = {what: [] for what, _, _ in cases}
    order = random.Random(0)
    for _ in range(options.rounds):
        for what, client, model in order.sample(cases, len(cases)):
            speeds[what].append(await tokens_per_second(client, model, options))
        report["throughput"] = [
            {
                "what": what,
                "tokens_per_second": round(statistics.mean(values), 1),
                "rounds": [round(value, 1) for value in values],
            }
            for what, values in speeds.items()
        ]
        save(options.out, report)
    mean = {row["what"]: row["tokens_per_second"] for row in report["throughput"]}
    report["throughput_ratios"] = {
        **{
            f"{what} rank {rank} / vLLM alone": round(
                mean[f"{what} rank {rank}"] / mean[f"vLLM alone, plain rank {rank}"], 4
            )
            for rank in (RANK, SUM)
            for what in ("plugin idle, plain", "plugin, merged")
        },
        "vLLM alone, rank 128 / rank 16": round(
            mean[f"vLLM alone, plain rank {SUM}"] / mean[f"vLLM alone, plain rank {RANK}"], 4
        ),
    }
    for name, value in (mean | report["throughput_ratios"]).items():
        print(f"throughput {name:45} {value}", flush=True)


async def memory(client: Client, options: argparse.Namespace, report: dict[str, Any]) -> None:
    """Ask 50 recipes in turn, whose artifacts evict one another, and look at the memory every few merges."""
    deadline = time.monotonic() + options.memory_seconds
    every = max(1, options.merges // 50)
    done, samples = [0], [await client.memory()]
    for index in range(options.merges):
        await client.first_token(f"many-{index % MANY}")
        if (index + 1) % every == 0:
            done.append(index + 1)
            samples.append(await client.memory())
        if time.monotonic() > deadline:
            break
    series = {name: [sample[name] for sample in samples] for name in samples[0]}
    start = min(100, int(WARM_UP * done[-1]))
    kept = [place for place, merges in enumerate(done) if merges >= start]
    x = np.array([done[place] for place in kept])
    slopes = {
        name: round(float(np.polyfit(x, np.array(values)[kept], 1)[0]) / 1e6, 4) for name, values in series.items()
    }
    held = (await client.get("/v1/merge/artifacts"))["data"]
    report["memory"] = {
        "merges": done,
        "bytes": series,
        "from_merge": start,
        "mb_per_merge": slopes,
        "held_at_the_end": held,
    }
    print(f"memory over merges {start} to {done[-1]}: MB per merge {slopes}", flush=True)


async def measure(place: Place, ours: Server, stock: Server | None, options: argparse.Namespace) -> None:
    report: dict[str, Any] = {
        **facts(place.shape, options.eager),
        "streams": options.streams,
        "adapters": ADAPTERS,
        "first_token_seconds": {},
        "throughput": [],
        "memory": {},
    }
    started = time.monotonic()
    await asyncio.gather(ours.up(), *([stock.up()] if stock is not None else []))
    print(f"up after {time.monotonic() - started:.0f} s", flush=True)
    async with contextlib.AsyncExitStack() as stack:
        client = await stack.enter_async_context(connected(ours))
        for part in options.parts:
            if part == "ttft":
                await ttft(place, client, options, report)
            elif part == "throughput":
                assert stock is not None
                other = await stack.enter_async_context(connected(stock))
                await throughput(place, client, other, options, report)
            else:
                await memory(client, options, report)
            save(options.out, report)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--parts", type=lambda text: text.split(","), default=list(PARTS), help=",".join(PARTS))
    parser.add_argument("--streams", type=int, default=STREAMS, help="that run meanwhile")
    parser.add_argument("--cold", type=int, default=10, help="cold requests of each kind")
    parser.add_argument("--ttft-seconds", type=float, default=90.0)
    parser.add_argument("--rounds", type=int, default=3, help="of the throughput windows")
    parser.add_argument("--window", type=float, default=6.0, help="seconds of a throughput window")
    parser.add_argument("--merges", type=int, default=500)
    parser.add_argument("--memory-seconds", type=float, default=180.0, help="fewer merges where these are up before")
    parser.add_argument("--cache-gib", type=float, default=8, help="VLLM_MERGE_CACHE_BYTES")
    parser.add_argument("--host-gib", type=float, default=2, help="VLLM_MERGE_HOST_BYTES")
    parser.add_argument("--kv-gib", type=int, default=6, help="KV cache of each server")
    parser.add_argument("--out", type=Path, default=Path("serving.json"))
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs")
    parser.add_argument("--port", type=int, default=8775)
    parser.add_argument("server_options", nargs="*", help="further options for vLLM, after --")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"unknown parts {', '.join(sorted(unknown))} (known: {', '.join(PARTS)})")
    with Place.made(SHAPES[options.shape]) as place:
        serve_and_measure(place, options)
    plot_serving(options.out)


def serve_and_measure(place: Place, options: argparse.Namespace) -> None:
    """Start what the parts need, and measure."""
    recipes = place.write_recipes(
        {
            "linear": (options.cold, LINEAR),
            "knots-ties": (options.cold, KNOTS_TIES),
            "cached": (CACHED, LINEAR),
            "rank16": (1, {**KNOTS_TIES, "rank": RANK}),
            "many": (MANY, LINEAR),
        }
    )
    more = [*(["--enforce-eager"] if options.eager else []), *options.server_options]
    more += ["--kv-cache-memory-bytes", str(options.kv_gib << 30)]
    budgets = {
        "VLLM_MERGE_CACHE_BYTES": str(int(options.cache_gib * 2**30)),
        "VLLM_MERGE_HOST_BYTES": str(int(options.host_gib * 2**30)),
    }
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(server(place, recipes, options.port, more, budgets))
        stock = None
        if "throughput" in options.parts:
            stock = stack.enter_context(server(place, None, options.port + 1, more))
        asyncio.run(measure(place, ours, stock, options))


if __name__ == "__main__":
    main()
