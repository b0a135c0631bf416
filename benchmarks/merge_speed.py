# SPDX-License-Identifier: Apache-2.0
"""How long merges take, and how much memory: tensors on the device to merged bfloat16 factors on the device.

    python benchmarks/merge_speed.py --device cuda --seconds 240 --out benchmarks/results/merge_speed.json
    python benchmarks/merge_speed.py --device cpu --shapes 0.5b --n 4 --r 16 --parts table

Parts, in this order: `table` (the merges that have a goal), `files` (the same from safetensors files in the page cache),
`energy` (what the truncation of `delta` rules keeps against the exact one), `peers` (PEFT and the published KnOTS route,
each on a subset of modules, scaled by their number), `growth` (over adapters, ranks, shapes and layers), `held_out` (other points,
that the forecast of `vllm-merge plan` is checked with). Each has a share of the time, so that a run cut short has some of all; what a
part leaves over goes to those after it. The file is written after every row, so that a run that is cut keeps what it has. A row's floor is the larger of the times that its bytes take at the copy rate and its operations
at the rate of matrix products, both measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from growth import exponents
from merge_cases import TABLE, Case, Work, by_names
from plots import plot_speed
from rates import Rates, Timed, shares, timed
from shapes import ModelShape, random_adapters, shape_of

from vllm_merge import Adapter, merge
from vllm_merge.adapters.peft import read_each, write_adapter
from vllm_merge.algebra.truncation import OVERSAMPLING
from vllm_merge.plan_runner import WORKSPACE_BYTES

PARTS = {"table": 6, "files": 1, "energy": 1, "peers": 1, "growth": 2, "held_out": 1}  # and their shares of the time
RUNS = 10
GROWING = ("linear", "tsv_m", "knots_ties", "knots_ties_r64", "delta_ties_r64")
FROM_FILES = ("linear", "knots_ties", "delta_ties_r64")
ENERGY = ("delta_ties_r64", "delta_dare_ties_r64")
# What grows, one thing at a time, from the point of the table: (shape, n, r).
GROWTH = {
    "cuda": [
        *[("8b", n, 16) for n in (2, 4, 16)],
        *[("8b", 8, r) for r in (8, 64)],
        *[(shape, 8, 16) for shape in ("8b:8", "8b:16", "8b:64", "0.5b", "70b")],
        ("0.5b", 2, 8),
        ("8b", 32, 16),  # seconds for one
    ],
    "cpu": [
        *[("0.5b:4", n, 16) for n in (2, 4, 8)],
        *[("0.5b:4", 4, r) for r in (8, 64)],
        *[(shape, 4, 16) for shape in ("8b:1", "0.5b:1", "0.5b:8")],
        ("8b:1", 2, 8),
    ],
}
HELD_OUT = {
    "cuda": [("8b", 6, 32), ("8b:20", 12, 16), ("0.5b", 5, 24), ("70b:20", 4, 16)],
    "cpu": [("0.5b:3", 3, 16), ("0.5b:6", 6, 12), ("8b:1", 2, 32)],
}
POINT = {"cuda": TABLE, "cpu": ("0.5b", 4, 16)}
CPU_GOAL = 2.0  # seconds for a closed form at POINT["cpu"] on two cores


@dataclass
class Bench:
    """One run: what it writes, and until when: the end of the part that is measured."""

    device: str
    out: Path
    deadline: float
    row_seconds: float
    cases: list[Case]
    rates: Rates
    workspace_bytes: int | None
    report: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    peers: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    _adapters: tuple[tuple[str, int], list[Adapter]] | None = None

    @property
    def kind(self) -> str:
        return torch.device(self.device).type

    @property
    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    def save(self) -> None:
        """Write everything there is; the file is whole at any time."""
        content = {**self.facts, "rates": self.rates.to_dict(), "rows": self.rows, "peers": self.peers}
        temporary = self.out.with_suffix(".part")
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        temporary.replace(self.out)

    def adapters(self, shape: ModelShape, n: int, r: int) -> list[Adapter]:
        """The first n random adapters of a shape and rank; the last ones are kept for the next row."""
        key = (shape.name, r)
        if self._adapters is None or self._adapters[0] != key or len(self._adapters[1]) < n:
            self._adapters = None
            self._adapters = (key, random_adapters(shape, n, r, self.device))
        return self._adapters[1][:n]

    def options(self) -> dict[str, Any]:
        """Of every merge; the brief report is what a server has made."""
        given = {} if self.workspace_bytes is None else {"workspace_bytes": self.workspace_bytes}
        return {"dtype": torch.bfloat16, "device": self.device, "report": self.report, **given}

    def measure(self, case: Case, point: tuple[str, int, int], **extra: Any) -> None:
        """One row."""
        shape, n, r = shape_of(point[0]), point[1], point[2]
        table = extra["part"] == "table"
        limit = min(self.row_seconds if table else self.row_seconds / 2, self.left)
        if limit <= 0 or (case.only_n is not None and case.only_n != n and not table):
            return
        n = case.only_n or n
        runs = RUNS if table else RUNS // 2
        try:
            adapters = self.adapters(shape, n, r)
            took, merged = timed(
                lambda: merge(adapters, **case.arguments(), **self.options()), self.device, runs, limit
            )
        except torch.OutOfMemoryError:
            self._adapters = None
            self.refuse(case, point, "out of memory")
            return
        except Exception as error:  # one method that fails must not cost the rows of the others
            self.refuse(case, point, f"{type(error).__name__}: {error}")
            return
        inputs = sum(adapter.nbytes for adapter in adapters)
        workspace = merged.report.peak_workspace_bytes if took.peak is None else took.peak - merged.nbytes
        self.add(case, shape, n, r, merged.rank, took, inputs, merged.nbytes, workspace, **extra)

    def refuse(self, case: Case, point: tuple[str, int, int], why: str) -> None:
        """Say what was not measured."""
        print(f"{case.name:22} {point}: {why}", flush=True)
        self.facts.setdefault("not_measured", []).append({"case": case.name, "point": point, "why": why})

    def add(
        self,
        case: Case,
        shape: ModelShape,
        n: int,
        r: int,
        rank: int,
        took: Timed,
        inputs: int,
        result: int,
        workspace: int,
        goal: float | None = None,
        **extra: Any,
    ) -> None:
        """Note a row, say it, and write the file. `goal` stands in for the case's own."""
        by_bytes, by_operations = self.rates.floors(Work.of(case, shape, n, r, rank))
        point = (shape.name, n, r)
        if goal is None and self.kind == "cuda" and (shape.name, n, r) == (TABLE[0], case.only_n or TABLE[1], TABLE[2]):
            goal = case.goal
        if goal is None and self.kind == "cpu" and point == POINT["cpu"] and case.closed:
            goal = CPU_GOAL
        row = {
            "method": case.method,
            "space": case.space,
            "shape": shape.name,
            "n": n,
            "r": r,
            "rank": rank,
            "seconds": round(took.seconds, 6),
            "peak_bytes": inputs + result + workspace,
            "floor_seconds": round(max(by_bytes, by_operations), 6),
            "case": case.name,
            "asked_rank": case.rank,
            "parameters": dict(case.parameters),
            "goal": goal,
            "workspace_goal": case.workspace_goal,
            "times_goal": round(took.seconds / goal, 3) if goal else None,
            "floor_bytes_seconds": round(by_bytes, 6),
            "floor_operations_seconds": round(by_operations, 6),
            "fastest": round(took.fastest, 6),
            "slowest": round(took.slowest, 6),
            "runs": took.runs,
            "busy_seconds": took.busy,
            "layers": shape.layers,
            "modules": 7 * shape.layers,
            "input_bytes": inputs,
            "result_bytes": result,
            "workspace_bytes": workspace,
            **extra,
        }
        self.rows.append(row)
        print(in_words(row), flush=True)
        self.save()


def in_words(row: dict[str, Any]) -> str:
    goal = f"goal {1e3 * row['goal']:8.1f} ms  x {row['times_goal']:6.2f}" if row["goal"] else " " * 26
    return (
        f"{row['part']:8} {row['case']:20} {row['shape']:>7} n={row['n']:<2} r={row['r']:<2} rank {row['rank']:<4} "
        f"{1e3 * row['seconds']:9.2f} ms  {goal}  floor {1e3 * row['floor_seconds']:7.2f} ms  "
        f"workspace {row['workspace_bytes'] / 2**20:7.0f} MiB"
    )


def table(bench: Bench, points: Sequence[tuple[str, int, int]]) -> None:
    """Every case at every point."""
    for point in points:
        for case in bench.cases:
            bench.measure(case, point, part="table")


def from_files(bench: Bench, point: tuple[str, int, int]) -> None:
    """From PEFT folders in the page cache to merged factors: read, hashed, moved, merged."""
    shape, n, r = shape_of(point[0]), point[1], point[2]
    with tempfile.TemporaryDirectory(prefix="vllm-merge-speed-") as name:
        folders = [Path(name) / f"a{index}" for index in range(n)]
        for folder, adapter in zip(folders, bench.adapters(shape, n, r), strict=True):
            write_adapter(folder, adapter.factors, base_model=None)
        size = sum((folder / "adapter_model.safetensors").stat().st_size for folder in folders)
        bench._adapters = None
        for case in bench.cases:
            limit = min(bench.row_seconds, bench.left)
            if case.name not in FROM_FILES or limit <= 0:
                continue

            def act(case: Case = case) -> Any:
                read = read_each(partial(Adapter.from_peft, device=bench.device), folders)
                return merge(read, **case.arguments(), **bench.options())

            took, merged = timed(act, bench.device, 5, limit)
            moving = 1.3 * size / bench.rates.pinned_bytes
            goal = case.goal + moving if case.goal is not None and bench.kind == "cuda" and point == TABLE else None
            workspace = merged.report.peak_workspace_bytes if took.peak is None else took.peak - merged.nbytes
            bench.add(
                case,
                shape,
                n,
                r,
                merged.rank,
                took,
                0 if took.peak is not None else size,
                merged.nbytes,
                workspace,
                goal=goal,
                part="files",
                file_bytes=size,
            )


def grow(bench: Bench, points: Sequence[tuple[str, int, int]], part: str) -> None:
    """The cases that stand for the others, at points beside the table's; then the others, while there is time."""
    first = [case for case in bench.cases if case.name in GROWING and case.space != "delta"]
    dense = [case for case in bench.cases if case.name in GROWING and case.space == "delta"]
    for cases in (first, dense, [case for case in bench.cases if case.name not in GROWING]):
        for point in points:
            for case in cases:
                bench.measure(case, point, part=part)


def points_of(options: argparse.Namespace, kind: str) -> list[tuple[str, int, int]]:
    """All combinations of what was asked for; what was not is as in the table."""
    shape, n, r = POINT[kind]
    shapes, counts, ranks = options.shapes or [shape], options.n or [n], options.r or [r]
    return [(one, count, rank) for one in shapes for rank in ranks for count in counts]


def run(bench: Bench, options: argparse.Namespace) -> Iterator[str]:
    """Yield the name of each part once it is done."""
    points = points_of(options, bench.kind)
    weights = [PARTS[part] for part in options.parts]
    for part, deadline in zip(options.parts, shares(bench.left, weights), strict=True):
        bench.deadline = deadline
        if part == "table":
            table(bench, points)
        elif part == "files":
            from_files(bench, points[0])
        elif part == "peers":
            from peers import measure_peers

            bench._adapters = None
            for row in measure_peers(points[0], bench.device, min(bench.left, options.peer_seconds)):
                bench.peers.append(row)
                print(f"peers    {row['peer']:6} {row['what']:40} {row['seconds']:9.2f} s", flush=True)
                bench.save()
        elif part == "growth":
            grow(bench, GROWTH[bench.kind], part)
        elif part == "held_out":
            grow(bench, HELD_OUT[bench.kind], part)
        elif part == "energy":
            from kept_energy import kept_against_exact

            shape, n, r = shape_of(points[0][0]), points[0][1], points[0][2]
            adapters = bench.adapters(shape, n, r)
            bench.facts["energy"] = []
            cut = [case for case in bench.cases if case.name in ENERGY]
            for case, end in zip(cut, shares(bench.left, [1] * len(cut)), strict=True):
                seconds = min(end - time.monotonic(), options.energy_seconds)
                if seconds <= 0:
                    continue
                found = kept_against_exact(case, adapters, bench.device, seconds)
                bench.facts["energy"].append({"case": case.name, "shape": shape.name, "n": n, "r": r, **found})
                print(f"energy   {case.name:20} {found}", flush=True)
        bench.save()
        yield part


def words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def numbers(text: str) -> list[int]:
    return [int(word) for word in words(text)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("merge_speed.json"))
    parser.add_argument("--seconds", type=float, default=240.0, help="when to stop, in seconds from the start")
    parser.add_argument("--row-seconds", type=float, default=12.0, help="at most for one row, its warm-up included")
    parser.add_argument("--peer-seconds", type=float, default=45.0, help="for the part `peers`")
    parser.add_argument("--energy-seconds", type=float, default=30.0, help="for each case of the part `energy`")
    parser.add_argument("--parts", type=words, default=list(PARTS), help=f"of {','.join(PARTS)}")
    parser.add_argument("--methods", type=words, help="cases or methods, separated by commas; default: all")
    parser.add_argument("--shapes", type=words, help="such as 0.5b,8b,70b; 8b:16 has 16 layers")
    parser.add_argument("--n", type=numbers, help="numbers of adapters")
    parser.add_argument("--r", type=numbers, help="ranks of the adapters")
    parser.add_argument("--workspace-mib", type=int, help="bound on what a merge holds; default: that of `merge`")
    parser.add_argument("--report", choices=("brief", "full"), default="brief", help="of every merge")
    parser.add_argument("--add", action="store_true", help="keep the rows that the file has already")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"unknown parts {', '.join(sorted(unknown))} (known: {', '.join(PARTS)})")
    try:
        cases = list(by_names(options.methods))
        for name in options.shapes or ():
            shape_of(name)
    except ValueError as error:
        parser.error(str(error))
    deadline = time.monotonic() + options.seconds
    bench = Bench(
        options.device,
        options.out,
        deadline,
        options.row_seconds,
        cases,
        Rates.measure(options.device),
        None if options.workspace_mib is None else options.workspace_mib << 20,
        options.report,
    )
    gpu, threads = bench.kind == "cuda", torch.get_num_threads()
    bench.facts = {
        "device": torch.cuda.get_device_name() if gpu else f"CPU, {threads} thread{'s' if threads > 1 else ''}",
        "torch": torch.__version__,
        "date": date.today().isoformat(),
        "machine": platform.machine(),
        "load": None if gpu else [round(load, 2) for load in os.getloadavg()],
        "report": options.report,
        "workspace_bound": bench.workspace_bytes or WORKSPACE_BYTES,
        "oversampling": OVERSAMPLING,
        "unit": "seconds, bytes",
    }
    if options.add and options.out.exists():
        before = json.loads(options.out.read_text())
        bench.rows, bench.peers = before["rows"], before["peers"]
        bench.rates = bench.rates.best(Rates(**before["rates"]))
        bench.facts |= {key: before[key] for key in ("energy", "not_measured") if key in before}
    print(bench.facts["device"], bench.rates.to_dict(), flush=True)
    for part in run(bench, options):
        print(f"-- {part} done, {deadline - time.monotonic():.0f} s left", flush=True)
    print("\n".join(exponents(bench.rows)))
    plot_speed(options.out)


if __name__ == "__main__":
    main()
