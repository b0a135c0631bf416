# SPDX-License-Identifier: Apache-2.0
"""What names are resolved for, where no worker is asked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FACTS: Mapping[str, Any] = {
    "base_model": "an/unknown-base",
    "base_revision": None,
    "base_model_hash": "0" * 64,
    "dtype": "float32",
    "max_lora_rank": 64,
}
"""Of a worker's answer to `hello`."""
