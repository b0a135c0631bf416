# SPDX-License-Identifier: Apache-2.0
"""Canonical JSON, and the SHA-256 of it: equal descriptions give equal digests, whatever their keys' order."""

import hashlib
import json
from typing import Any

MAX_EXACT_INTEGER = 2**53


def digest_of(value: Any) -> str:
    """SHA-256 of the canonical JSON of `value`, 64 hexadecimal digits."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces, in ASCII; 1 and 1.0 are written alike. Refuses NaN and infinities."""
    return json.dumps(_canonical(value), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def _canonical(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _canonical(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(item) for item in value]
    if isinstance(value, float) and value.is_integer() and abs(value) < MAX_EXACT_INTEGER:
        return int(value)
    return value
