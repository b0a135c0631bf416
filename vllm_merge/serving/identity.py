# SPDX-License-Identifier: Apache-2.0
"""How an artifact is called inside vLLM: its LoRA id and its path, both functions of its digest.

vLLM keeps LoRA ids as int32 and counts its own from 1 upwards; ours start at 2**30. The path is never a file: it tells our
loader which artifact is meant, and together with the name it keys vLLM's prefix cache, so that two artifacts never share
a cached block. `attempt` is 0 unless an id collided with another artifact's or an artifact was once loaded broken.
"""

from __future__ import annotations

import hashlib
import re

SCHEME = "vllm-merge://"
FIRST_ID = 1 << 30

_PATH = re.compile(re.escape(SCHEME) + r"([0-9a-f]{64})/(\d{1,6})")


def lora_id(digest: str, attempt: int = 0) -> int:
    """2**30 plus 30 bits of the digest (of its rehash for a later attempt): the same in every process and replica."""
    source = bytes.fromhex(digest)
    if attempt:
        source = hashlib.sha256(f"{digest}/{attempt}".encode()).digest()
    return FIRST_ID + (int.from_bytes(source[:4], "big") >> 2)


def lora_path(digest: str, attempt: int = 0) -> str:
    return f"{SCHEME}{digest}/{attempt}"


def parse_path(path: str) -> str | None:
    """The digest that a LoRA path of ours names; None for a path that is not ours."""
    match = _PATH.fullmatch(path)
    return match.group(1) if match else None
