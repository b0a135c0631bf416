# SPDX-License-Identifier: Apache-2.0
"""The whole benchmark, on a GPU: train what is missing, measure what is not measured, and at the end write the page.

    python -m benchmarks.quality.run --data DIR [--seconds 540] [--jobs 3]

A run that is cut, or ends after --seconds, goes on where it was when it is called again.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from benchmarks.quality.grid import Config, estimate, plan
from benchmarks.quality.prepare import Bench, machine, opened, prepare_set
from benchmarks.quality.records import Writer, begin_anew, key, read_rows, read_run, write_run
from benchmarks.quality.settings import ADAPTER_SETS, PRESETS, Settings
from benchmarks.quality.sweep import Sweep
from benchmarks.quality.tasks import read_tasks

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
RESULTS = HERE.parent / "results" / "quality"
DATA = HERE / "data"
LEAST_TASKS = 6


@dataclass(frozen=True)
class Places:
    """Where a run reads and writes, and on what it runs; small enough to be sent to other processes."""

    settings: Settings
    data: Path
    weights: Path
    results: Path
    device: str

    @property
    def threads(self) -> int:
        """Of a process beside others."""
        return max(1, (os.cpu_count() or 1) // 4)

    def take_gpu(self) -> None:
        """In a process of a pool: of several GPUs take one, in turn."""
        count = torch.cuda.device_count() if self.device == "cuda" else 0
        if count > 1:
            torch.cuda.set_device(process_number() % count)

    def open(self) -> Bench:
        tasks = {task.name: task for task in read_tasks(self.data, self.settings.words, self.settings.test)}
        return opened(self.settings, self.data, self.weights, self.results, torch.device(self.device), tasks)


def run(
    places: Places,
    *,
    until: float,
    jobs: int = 1,
    methods: Sequence[str] | None = None,
    stages: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    sets: Sequence[str] = ADAPTER_SETS,
) -> int:
    """All of it, or what these allow, until time.monotonic() is `until`; how many merges are left."""
    chosen = places.settings.seeds if seeds is None else seeds
    bench = places.open()
    with _measuring(places, bench, jobs) as measured:
        prepare_set(bench, "plain", chosen)
        tasks = bench.counted()
        print(f"{len(tasks)} of {len(bench.tasks)} tasks count: {', '.join(tasks)}", flush=True)
        least = min(LEAST_TASKS, places.settings.tasks)
        if len(tasks) < least:
            raise SystemExit(f"at least {least} tasks must count; see `gate` of {places.results}/run.json")
        configs = plan(places.settings, tasks, methods, stages)
        configs = [config for config in configs if config.seed in chosen and config.set in sets]
        left = _left(places, configs)
        seconds = estimate(left, read_rows(places.results), bench.device.type, jobs)
        print(f"{len(configs)} merges, {len(left)} left: about {seconds / 60:.0f} minutes with {jobs} jobs", flush=True)
        ready = {"plain"}
        while left and time.monotonic() < until:
            prepare_set(bench, left[0].set, chosen)
            ready.add(left[0].set)
            part = next((place for place, config in enumerate(left) if config.set not in ready), len(left))
            end = time.time() + until - time.monotonic()  # on a clock that other processes have too
            found = measured([(config, end) for config in left[:part]])
            if jobs > 1 and part < len(left):  # what comes next is trained while the others measure
                prepare_set(bench, left[part].set, chosen)
            done = sum(found)
            print(f"measured {done} of {part} of the {', '.join(sorted(ready))} adapters", flush=True)
            if done < part:
                break
            left = left[part:]
    return len(_left(places, configs))


Work = tuple[Config, float]
"""A merge to measure, and the time (seconds since 1970) from which on it is left."""


@contextmanager
def _measuring(places: Places, bench: Bench, jobs: int) -> Iterator[Callable[[Sequence[Work]], Iterator[bool]]]:
    """A function that measures, and says of each merge whether it was measured; with several jobs, in other processes."""
    if jobs == 1:
        measurer = _Measurer(bench, Writer(places.results))
        yield lambda work: map(measurer.measure, work)
        return
    with multiprocessing.get_context("spawn").Pool(jobs, _Measurer.prepare, (places,)) as pool:
        pool.map_async(_Measurer.warm, range(jobs), chunksize=1)  # they open their models while this one trains
        yield lambda work: pool.imap_unordered(_Measurer.elsewhere, work)


@dataclass
class _Measurer:
    """Measures merges in a process, one at a time."""

    bench: Bench
    writer: Writer
    places: ClassVar[Places]
    own: ClassVar[_Measurer | None] = None

    def __post_init__(self) -> None:
        self._sweep = Sweep(self.bench)

    def measure(self, work: Work) -> bool:
        config, end = work
        if time.time() >= end:
            return False
        self.writer.add(self._sweep.measure(config))
        return True

    @classmethod
    def prepare(cls, places: Places) -> None:
        """In a process of a pool."""
        places.take_gpu()
        cls.places = places
        torch.set_num_threads(places.threads)

    @classmethod
    def warm(cls, _: int) -> _Measurer:
        """That of this process."""
        if cls.own is None:
            cls.own = cls(cls.places.open(), Writer(cls.places.results, f"rows-{process_number()}"))
        return cls.own

    @classmethod
    def elsewhere(cls, work: Work) -> bool:
        return cls.warm(0).measure(work)


def process_number() -> int:
    """Of a process of a pool, from 1."""
    return int(multiprocessing.current_process().name.rpartition("-")[2])


def _left(places: Places, configs: Sequence[Config]) -> list[Config]:
    done = {key(row) for row in read_rows(places.results)}
    return [config for config in configs if key(config.row()) not in done]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    with_options(parser)
    parser.add_argument("--methods", nargs="+", help="only these")
    parser.add_argument("--stages", nargs="+", help="only these, such as 'all tasks' osrm mixed '4 tasks' pairs ranks")
    parser.add_argument("--seeds", nargs="+", type=int, help="only these; the weights of others need not be here")
    parser.add_argument("--sets", nargs="+", choices=ADAPTER_SETS, default=ADAPTER_SETS, help="merges of these alone")
    parser.add_argument("--anew", action="store_true", help="first forget all rows; the base and its record stay")
    args = parser.parse_args()
    until = time.monotonic() + args.seconds
    places = places_of(args)
    results = places.results
    if args.anew:
        begin_anew(results)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what `repeatable` needs before the first product
    began, before = time.monotonic(), _measured(results)
    left = run(
        places,
        until=until,
        jobs=args.jobs,
        methods=args.methods,
        stages=args.stages,
        seeds=args.seeds,
        sets=args.sets,
    )
    (merged, trained), (merges, sets) = before, _measured(results)
    record_call(places, "merges", began, args.jobs, merges - merged, [name for name in sets if name not in trained])
    if left:
        print(f"{left} merges left; the same command goes on, and benchmarks.quality.report shows what is there")
        return
    from benchmarks.quality.report import write_editions, write_report

    if results == RESULTS:
        write_editions()
    else:
        write_report(results, results / "evidence.md")


def _measured(results: Path) -> tuple[int, list[str]]:
    """How many merges are recorded, and of which sets the training is."""
    sets = [name.removeprefix("adapters ") for name in read_run(results) if name.startswith("adapters ")]
    return sum(row["kind"] == "merge" for row in read_rows(results)), sets


def record_call(places: Places, what: str, began: float, jobs: int, count: int, trained: Sequence[str] = ()) -> None:
    """In run.json: on what a call ran, its minutes, from time.monotonic() at its start, how much it measured, and the sets of adapters
    that it trained for it."""
    content, gpus = read_run(places.results), torch.cuda.device_count() if places.device == "cuda" else 1
    call = {
        "what": what,
        "device": machine(torch.device(places.device)),
        "devices": min(gpus, jobs),
        "minutes": round((time.monotonic() - began) / 60, 2),
        "jobs": jobs,
        "count": count,
        "trained": list(trained),
    }
    write_run(places.results, {**content, "calls": [*content.get("calls", []), call]})


def with_options(parser: argparse.ArgumentParser) -> None:
    """What all that measures is asked for."""
    parser.add_argument(
        "--data", type=Path, default=Path(os.environ.get("QUALITY_DATA", DATA)), help="tasks and corpus"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    parser.add_argument("--preset", choices=PRESETS, default="full", help="`small` tries the code on a CPU")
    parser.add_argument(
        "--weights", type=Path, help="base and adapters, which can be made again (build/quality/PRESET)"
    )
    parser.add_argument("--results", type=Path, help="what was found (benchmarks/results/quality for `full`)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop measuring after this long")
    parser.add_argument("--jobs", type=int, default=1, help="processes that measure at once")


def places_of(args: argparse.Namespace) -> Places:
    """Of the options."""
    weights = args.weights or ROOT / "build" / "quality" / args.preset
    results = args.results or (RESULTS if args.preset == "full" else weights / "results")
    return Places(PRESETS[args.preset], args.data, weights, results, args.device)


if __name__ == "__main__":
    main()
