# SPDX-License-Identifier: Apache-2.0
"""Files on their way into memory: each piece is hashed where it was read to, so that what is used is what was hashed.

To hash takes most of the time (SHA-256 goes through a file in order); the interpreter is needed between pieces alone, so
several threads read and hash several files. On the way to a GPU a file passes through one pinned piece, which is copied
while it is hashed: no file is in host memory as a whole.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vllm_merge.adapters.tensor_file import LENGTH_BYTES, MAX_FILE_BYTES, MAX_HEADER_BYTES
from vllm_merge.errors import UserInputError

if TYPE_CHECKING:
    import hashlib

Memory = Callable[[int, int], Tensor]
"""Given a file's bytes and where its tensors begin: where to read it to, (bytes,) uint8. Tensors are best aligned there."""

PIECE_BYTES = 4 << 20
ALIGNED = 256  # bytes; what any kernel asks of an address
_LARGE_BYTES = 4 << 20  # from here on memory comes in large pages, which take a quarter of the time to get


def own_pages(size: int) -> mmap.mmap:
    """Memory beside malloc's heap, which the system has again at once when nobody uses it any more."""
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def host_memory(size: int, first: int) -> Tensor:
    """New host memory."""
    shift = -first % ALIGNED
    if size < _LARGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size + shift, dtype=torch.uint8)[shift:]
    pages = own_pages(size + shift)
    with suppress(OSError):  # a kernel without large pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)[shift:]


def memory_on(device: torch.device) -> Memory:
    """New memory of a device."""
    if device.type == "cpu":
        return host_memory

    def memory(size: int, first: int) -> Tensor:
        shift = -first % ALIGNED
        return torch.empty(size + shift, dtype=torch.uint8, device=device)[shift:]

    return memory


def read_hashed(path: Path, digest: hashlib._Hash, memory: Memory) -> tuple[Tensor, bytes]:
    """Read a safetensors file as a whole, and hash it. Gives its bytes, and those before its tensors on the host as well.

    Raises UserInputError for a file that is too large, or shorter when it is read than it was before.
    """
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_FILE_BYTES:
            raise UserInputError(
                f"{path}: {size:,} bytes; at most {MAX_FILE_BYTES:,} are read; this is no LoRA adapter"
            )
        data = memory(size, _first_tensor(file.read(LENGTH_BYTES)))
        file.seek(0)
        passing = _passing(data)
        head, wanted = bytearray(), 0
        for start in range(0, size, PIECE_BYTES):
            piece = data[start : start + PIECE_BYTES]
            host = piece if passing is None else passing[: len(piece)]
            view = host.numpy().data
            if (filled := _fill(file, view)) < len(view):
                raise UserInputError(
                    f"{path}: ended after {start + filled:,} of {size:,} bytes; it changed while it was read"
                )
            if passing is not None:
                piece.copy_(host, non_blocking=data.is_cuda)
            digest.update(view)
            if start == 0:
                wanted = _first_tensor(bytes(view[:LENGTH_BYTES]))
            if start < wanted:
                head += view[: wanted - start]
            if data.is_cuda:
                torch.cuda.current_stream(data.device).synchronize()
    return data, bytes(head)


def feed(path: Path, digest: hashlib._Hash) -> None:
    """Hash a file."""
    piece = memoryview(bytearray(PIECE_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(piece):
            digest.update(piece[:count])


def _first_tensor(prefix: bytes) -> int:
    """Where the tensors of a file begin, by its first bytes; where that is more than is ever read, as much as that."""
    return LENGTH_BYTES + min(int.from_bytes(prefix[:LENGTH_BYTES], "little"), MAX_HEADER_BYTES)


def _passing(data: Tensor) -> Tensor | None:
    """What a file passes through on its way to `data`; None where it is read there."""
    if data.device.type == "cpu":
        return None
    return torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=data.is_cuda)


def _fill(file: FileIO, view: memoryview) -> int:
    filled = 0
    while filled < len(view) and (count := file.readinto(view[filled:])):
        filled += count
    return filled
