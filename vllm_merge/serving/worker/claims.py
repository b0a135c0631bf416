# SPDX-License-Identifier: Apache-2.0
"""Which artifact a LoRA id stands for in a worker. vLLM knows adapters by their ids alone, so one id is never two artifacts."""

from __future__ import annotations

import threading
from collections.abc import Callable

LIMIT = 4096  # claims, beyond which those that nothing depends on are forgotten


class Claims:
    """id -> digest. in_use(id, digest): whether vLLM, a lease or the cache still knows the pair.

    A claim is only forgotten when that is not so: no slot, no adapter that vLLM registered and no request has the id, and an
    API process asks for it again before it uses it. An id under which something wrong was loaded is never given away: cached
    prefixes may have come from it.
    """

    def __init__(self, in_use: Callable[[int, str], bool], limit: int = LIMIT) -> None:
        self._in_use, self._limit = in_use, limit
        self._owners: dict[int, str] = {}
        self._broken: dict[int, str] = {}
        self._lock = threading.Lock()

    def claim(self, lora_id: int, digest: str) -> str | None:
        """Take an id for an artifact; None if that went well, else whose it is."""
        with self._lock:
            if lora_id in self._broken:
                return "one that was loaded wrongly"
            owner = self._owners.setdefault(lora_id, digest)
            if len(self._owners) > self._limit:
                self._forget(lora_id)
            return None if owner == digest else owner[:12]

    def break_(self, lora_id: int, reason: str) -> None:
        """Something else than the artifact was loaded under the id."""
        with self._lock:
            self._owners.pop(lora_id, None)
            self._broken[lora_id] = reason

    def reason(self, lora_id: int) -> str | None:
        """What went wrong under an id; None if nothing did."""
        return self._broken.get(lora_id)

    def digest(self, lora_id: int | None) -> str | None:
        return self._owners.get(lora_id) if lora_id is not None else None

    def __len__(self) -> int:
        return len(self._owners)

    def _forget(self, newest: int) -> None:
        """Down to half the limit, oldest first, so that a look at all of them is rare."""
        surplus = len(self._owners) - self._limit // 2
        for lora_id, digest in list(self._owners.items()):
            if surplus <= 0:
                return
            if lora_id != newest and not self._in_use(lora_id, digest):
                del self._owners[lora_id]
                surplus -= 1
