# SPDX-License-Identifier: Apache-2.0
"""Taking turns on a GPU: what runs long says where it may be interrupted, and who shares the device says what happens then.

A server that merges beside running requests sets a function that waits until the device has done the last piece and then
leaves it to the requests for a while; nothing happens for anybody else.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class _Turns(threading.local):
    rest: Callable[[], None] | None = None


_turns = _Turns()


@contextmanager
def taking_turns(rest: Callable[[], None]) -> Iterator[None]:
    """Call `rest` between the pieces of what this thread runs in the block."""
    before, _turns.rest = _turns.rest, rest
    try:
        yield
    finally:
        _turns.rest = before


def between() -> None:
    """Here a piece ends: up to a few milliseconds of the device's time."""
    if _turns.rest is not None:
        _turns.rest()


def pieces(batch: int, device: torch.device) -> list[slice]:
    """A batch of matrices, each of which one multiprocessor works on for milliseconds: all of it, or who takes turns as many at
    once as there are multiprocessors, since more would only queue.
    """
    if _turns.rest is None:
        return [slice(0, batch)]
    at_once = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return [slice(start, min(start + at_once, batch)) for start in range(0, batch, at_once)]
