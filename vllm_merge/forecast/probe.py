# SPDX-License-Identifier: Apache-2.0
"""How fast a device is, in three figures that take a fraction of a second to measure."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

CALLS = 200


@dataclass(frozen=True, slots=True)
class Speed:
    """bytes: per second, read and written; operations: of a float32 matrix product, per second; call: seconds that
    PyTorch needs to start one small operation.
    """

    bytes: float
    operations: float
    call: float


def measure_speed(device: str) -> Speed:
    """The best of a few short trials on an idle device."""
    on = torch.device(device)
    gpu = on.type == "cuda"
    source = torch.ones(2**26 if gpu else 2**23, device=on)
    target = torch.empty_like(source)
    size = 4096 if gpu else 768
    matrix, product = torch.randn(size, size, device=on), torch.empty(size, size, device=on)
    small = torch.ones(4, device=on)

    def calls() -> None:
        for _ in range(CALLS):
            small.add(1)

    copied = best_seconds(lambda: target.copy_(source), on)
    multiplied = best_seconds(lambda: torch.mm(matrix, matrix, out=product), on)
    return Speed(2 * source.nbytes / copied, 2 * size**3 / multiplied, best_seconds(calls, on) / CALLS)


def best_seconds(act: Callable[[], object], device: torch.device, trials: int = 5) -> float:
    """The shortest of `trials` runs after one that does not count."""
    return min([seconds_of(act, device) for _ in range(trials + 1)][1:])


def seconds_of(act: Callable[[], object], device: torch.device) -> float:
    """How long `act` takes, until the device has done it."""
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    act()
    if gpu:
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
