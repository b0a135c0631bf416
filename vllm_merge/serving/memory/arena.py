# SPDX-License-Identifier: Apache-2.0
"""Where a worker's merges run and live: on a GPU, a stream and memory of their own.

The memory is taken while the model loads, so that vLLM sizes its KV cache around it. Once it is given up, torch's allocator
keeps it for the stream it was taken on, which is ours alone: merges and artifacts that stay within it ask the driver for
nothing.

For each thread and stream torch keeps a workspace for cuBLAS, 32 MiB on an H100, from the first product on, and only for all
streams at once can it be told to forget them: those of vLLM too, whose CUDA graphs write there. In the arena's memory one would
keep all of it from being given back. So a thread's first product on the stream is made in a memory pool apart.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from vllm_merge.kernels.turns import taking_turns

# Python hands the interpreter to another thread this often while a merge runs. vLLM's thread gives it up at every call into
# the device, hundreds of times a step, and waits this long to get it back each time.
SWITCH_SECONDS = 0.000001
# How many times as long as a piece of a merge has taken vLLM has the GPU and the interpreter to itself after it. While the
# merge waits for the GPU, a copy leaves the multiprocessors alone, but arithmetic, beside a step, takes twice its time and a
# third of the steps'; while it prepares what the GPU does, the GPU is nearly vLLM's alone.
REST, REST_OF_ARITHMETIC = 1.0, 4.0
SHORTEST_PIECE = 0.0005  # seconds, up to which pieces follow each other
LONGEST_REST = 0.05  # seconds
LIBRARY_SHAPE = 32  # rows and columns of the product that makes libraries take their workspaces
IDLE_SECONDS = 0.1  # without work on vLLM's stream, after which nobody is disturbed


class _QuickSwitches:
    """`with quick_switches: …`, in any number of threads at once: the last one that leaves sets back what the first found."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        # Linux lets a timed wait of an ordinary thread last 50 µs longer than asked; that of the main thread, vLLM's, no more.
        with contextlib.suppress(OSError):
            Path(f"/proc/{os.getpid()}/timerslack_ns").write_text("1000", encoding="ascii")
        self._before = sys.getswitchinterval()

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._before = sys.getswitchinterval()
                sys.setswitchinterval(SWITCH_SECONDS)
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                sys.setswitchinterval(self._before)


quick_switches = _QuickSwitches()


class Arena:
    """`with arena.use(): …` in the threads that merge and that bring artifacts back."""

    def __init__(self, device: torch.device, reserve_bytes: int) -> None:
        self.device = device
        self._bytes = reserve_bytes
        self._reserve: Tensor | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._apart = torch.cuda.MemPool()
            self._thread = threading.local()
            self._served = torch.cuda.default_stream(device)
            self._last_served = 0.0
            self._piece_began = 0.0
            self._waited = 0.0  # for the GPU, of the piece
        self.take(0)

    def take(self, used: int) -> None:
        """Take the memory: at first, and when it was given back. used: bytes of it that were kept."""
        if self.device.type == "cuda":
            with torch.cuda.stream(self._stream):
                self._reserve = torch.empty(self._bytes - used, dtype=torch.uint8, device=self.device)

    def give_back(self) -> None:
        """Give what is not used back to the driver."""
        self._reserve = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @contextlib.contextmanager
    def use(self) -> Iterator[None]:
        """Run on the arena's stream and memory; what was launched has been done when the block ends."""
        with quick_switches:
            if self.device.type != "cuda":
                yield
                return
            self._reserve = None
            torch.cuda.set_device(self.device)
            with torch.cuda.stream(self._stream):
                self._settle_libraries()
                self._piece_began, self._waited = time.perf_counter(), 0.0
                with taking_turns(functools.partial(self.rest, REST_OF_ARITHMETIC)):
                    yield
                self._stream.synchronize()

    def _settle_libraries(self) -> None:
        """What libraries keep for this thread and the arena's stream is taken now, outside of the arena's memory.

        Where the device has no memory for it the thread's products take it from the arena, and later calls try again.
        """
        if getattr(self._thread, "settled", False):
            return
        with contextlib.suppress(torch.OutOfMemoryError), torch.cuda.use_mem_pool(self._apart, self.device):
            square = torch.ones(LIBRARY_SHAPE, LIBRARY_SHAPE, device=self.device)
            torch.addmm(square[0], square @ square, square)  # cuBLAS, and with a bias cuBLASLt
            self._thread.settled = True

    def rest(self, times: float = REST) -> None:
        """Between two pieces of a merge: wait until the GPU has done the last one, then leave it to the requests that run.

        A piece delays a step by no more than it takes itself, so short pieces with rests between are what keeps the
        time between two tokens as it is.
        """
        if self.device.type != "cuda":
            return
        launched = time.perf_counter()
        self._stream.synchronize()
        now = time.perf_counter()
        self._waited += now - launched
        if now - self._piece_began < SHORTEST_PIECE:
            return
        if not self._served.query():
            self._last_served = now
        if now - self._last_served < IDLE_SECONDS:
            prepared = now - self._piece_began - self._waited
            time.sleep(min(LONGEST_REST, times * self._waited + REST * prepared))
        self._piece_began, self._waited = time.perf_counter(), 0.0
