# SPDX-License-Identifier: Apache-2.0
"""The rates of a device that floors are made of, measured, and the time and memory of a call on it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TypeVar

import torch
from merge_cases import Work

from vllm_merge.forecast.probe import best_seconds, measure_speed

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Rates:
    """Per second: bytes read and written by a copy; operations of float32 and of bfloat16 products; bytes from pinned,
    and from pageable host memory to the device. call_seconds: to start one small operation.
    """

    copy_bytes: float
    float32_operations: float
    bfloat16_operations: float
    pinned_bytes: float
    pageable_bytes: float
    call_seconds: float

    @classmethod
    def measure(cls, device: str) -> Rates:
        on = torch.device(device)
        speed = measure_speed(device)
        size = 8192 if on.type == "cuda" else 768
        matrix = torch.randn(size, size, device=on).bfloat16()
        product = torch.empty_like(matrix)
        half = 2 * size**3 / best_seconds(lambda: torch.mm(matrix, matrix, out=product), on)
        host = torch.ones(2**26 if on.type == "cuda" else 2**23)
        target = torch.empty_like(host, device=on)
        pageable = host.nbytes / best_seconds(lambda: target.copy_(host), on)
        if on.type == "cuda":
            host = host.pin_memory()
        pinned = host.nbytes / best_seconds(lambda: target.copy_(host, non_blocking=True), on)
        return cls(speed.bytes, speed.operations, max(half, speed.operations), pinned, pageable, speed.call)

    def best(self, other: Rates) -> Rates:
        """What was measured at another time as well: a machine that does other things can only seem slower than it is."""
        mine, theirs = asdict(self), asdict(other)
        return Rates(**{name: (min if name == "call_seconds" else max)(mine[name], theirs[name]) for name in mine})

    def floors(self, work: Work) -> tuple[float, float]:
        """The least seconds that the bytes need, and that the operations need."""
        return (
            work.bytes / self.copy_bytes,
            work.half / self.bfloat16_operations + work.single / self.float32_operations,
        )

    def to_dict(self) -> dict[str, float]:
        return {name: float(f"{value:.4g}") for name, value in asdict(self).items()}


def shares(seconds: float, weights: Sequence[float]) -> Iterator[float]:
    """When, on the monotonic clock, each of some tasks stops; what one leaves over, those after it share by their weights."""
    end = time.monotonic() + seconds
    for index, weight in enumerate(weights):
        now = time.monotonic()
        yield now + (end - now) * weight / sum(weights[index:])


@dataclass(frozen=True, slots=True)
class Timed:
    """seconds: the median of `runs`; peak: most bytes on the device beside what was there before, None on a CPU; busy: on a
    CPU with one thread, the least seconds that it worked, whatever else the machine did meanwhile; else None.
    """

    seconds: float
    fastest: float
    slowest: float
    runs: int
    peak: int | None
    busy: float | None


def timed(act: Callable[[], T], device: str, runs: int, limit: float) -> tuple[Timed, T]:
    """Time `act`, after one run that does not count (two where it is short), and give the last result.

    It is run `runs` times, or until `limit` seconds have passed, the run that does not count among them; once at least.
    """
    gpu = torch.device(device).type == "cuda"
    deadline = time.perf_counter() + limit

    worked: list[float] = []

    def once() -> tuple[float, T]:
        if gpu:
            torch.cuda.synchronize()
        started, busy = time.perf_counter(), time.process_time()
        result = act()
        if gpu:
            torch.cuda.synchronize()
        worked.append(time.process_time() - busy)
        return time.perf_counter() - started, result

    before = torch.cuda.memory_allocated() if gpu else 0
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    first, result = once()
    peak = torch.cuda.max_memory_allocated() - before if gpu else None
    found: list[float] = []
    if first < 1:
        del result
        _, result = once()
    while not found or (len(found) < runs and time.perf_counter() < deadline):
        del result
        seconds, result = once()
        found.append(seconds)
    least = min(worked) if not gpu and torch.get_num_threads() == 1 else None
    return Timed(statistics.median(found), min(found), max(found), len(found), peak, least), result
