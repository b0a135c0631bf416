# SPDX-License-Identifier: Apache-2.0
"""The bins in which latencies are counted: 2 % wide, so that a quantile is known to 1 %, whatever its size."""

from __future__ import annotations

import math

WIDTH = math.log(1.02)
_SMALLEST, _LARGEST = 1e-6, 1e6  # seconds


def bin_of(seconds: float) -> int:
    """The bin of a latency: ⌊ln(seconds) / ln(1.02)⌋, of what is within a microsecond and twelve days."""
    return math.floor(math.log(min(max(seconds, _SMALLEST), _LARGEST)) / WIDTH)
