# SPDX-License-Identifier: Apache-2.0
"""Where a worker's merges run and live: on a GPU, a stream and memory of their own.

The memory is taken while the model loads, so that vLLM sizes its KV cache around it. Once it is given up, torch's allocator
keeps it for the stream it was taken on, which is ours alone: merges and artifacts that stay within it ask the driver for
nothing.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

# Python hands the interpreter to another thread this often while a merge runs, so that vLLM's thread never waits long.
SWITCH_SECONDS = 0.0005


class Arena:
    """`with arena.use(): …` in the merging thread."""

    def __init__(self, device: torch.device, reserve_bytes: int) -> None:
        self.device = device
        self._reserve: Tensor | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            with torch.cuda.stream(self._stream):
                self._reserve = torch.empty(reserve_bytes, dtype=torch.uint8, device=device)

    @contextlib.contextmanager
    def use(self) -> Iterator[None]:
        """Run on the arena's stream and memory; what was launched has been done when the block ends."""
        before = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_SECONDS)
        try:
            if self.device.type != "cuda":
                yield
                return
            self._reserve = None
            torch.cuda.set_device(self.device)
            with torch.cuda.stream(self._stream):
                yield
                self._stream.synchronize()
        finally:
            sys.setswitchinterval(before)
