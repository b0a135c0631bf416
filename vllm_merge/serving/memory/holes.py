# SPDX-License-Identifier: Apache-2.0
"""Room in a block of memory that is given out in runs of bytes."""

from __future__ import annotations

from collections.abc import Iterable

ALIGN = 256  # bytes; every run begins at a multiple


def first_hole(taken: Iterable[tuple[int, int]], size: int, total: int) -> int | None:
    """Where `size` of `total` bytes are free beside the runs (first byte, end) that are taken: the first such place, or None."""
    at = 0
    for start, stop in sorted(taken):
        if start - at >= size:
            return at
        at = -(-stop // ALIGN) * ALIGN
    return at if total - at >= size else None
