# SPDX-License-Identifier: Apache-2.0
"""Where a unit falls: GrowthBook's hashes (https://docs.growthbook.io/lib/build-your-own#hash), so that an application that
uses its SDK with the same seed sees the same buckets; and what is stored in a unit's stead.
"""

from __future__ import annotations

import hashlib

MAX_UNIT = 512  # characters of a unit that are hashed one by one; a longer one is replaced by its SHA-256 first


def fnv1a32(text: str) -> int:
    """FNV-1a, 32 bits, over UTF-16 code units, as GrowthBook's JavaScript SDK takes them."""
    if text.isascii():
        units: bytes | memoryview = text.encode()
    else:
        units = memoryview(text.encode("utf-16-le", "surrogatepass")).cast("H")
    value = 0x811C9DC5
    for unit in units:
        value = ((value ^ unit) * 0x01000193) & 0xFFFFFFFF
    return value


def bucket(seed: str, unit: str) -> float:
    """GrowthBook's hash, version 2: one of 10,000 places in [0, 1)."""
    return fnv1a32(str(fnv1a32(seed + bounded(unit)))) % 10_000 / 10_000


def namespace_place(namespace: str, unit: str) -> float:
    """GrowthBook's place of a unit in a namespace (its hash, version 1): one of 1,000 in [0, 1)."""
    return fnv1a32(f"{bounded(unit)}__{namespace}") % 1_000 / 1_000


def bounded(unit: str) -> str:
    """The unit, or its SHA-256 where it is long: no request may make the server hash a megabyte character by character."""
    return unit if len(unit) <= MAX_UNIT else hashlib.sha256(unit.encode(errors="surrogatepass")).hexdigest()


def unit_hash(seed: str, unit: str) -> str:
    """What is stored in a unit's stead: 32 hex digits, salted with the experiment's seed, so that stores of two experiments
    do not tell who is the same.
    """
    return hashlib.sha256(f"{seed}\0{unit}".encode(errors="surrogatepass")).hexdigest()[:32]
