# SPDX-License-Identifier: Apache-2.0
"""The merges of requests that are kept: how many, how large, how often new ones, and until when.

Every API process has such a table. One that takes a merge in, uses it or lets it go tells the others, through the first worker's
control line, so that a label works at each of them. A process that was not there then does not know it: the recipe,
sent again, gives the same digest. Rates are counted by each process for itself.
"""

from __future__ import annotations

import math
import secrets
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_merge.errors import MergeError
from vllm_merge.recipe.plan import DIGITS_IN_NAMES, Plan
from vllm_merge.serving.control.control import Message
from vllm_merge.serving.control.front import Artifact, FrontDoor
from vllm_merge.serving.control.names import Name, Names
from vllm_merge.serving.settings import AdHocSettings

ADHOC = "adhoc"  # what every such merge is called: its kind, its name, and the first part of its label
EVENT = "adhoc"  # of the control line
MINUTE = 60.0


class QuotaExceeded(MergeError):
    """There is no room for another merge. retry_after: seconds after which there may be."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


@dataclass
class Entry:
    """bytes: the most that the result can have. used: time.monotonic(). told: whether the other processes know."""

    plan: Plan
    bytes: int
    used: float
    told: bool = True

    @property
    def label(self) -> str:
        return self.plan.artifact_name


class AdHocTable:
    """models: vLLM's table of names."""

    def __init__(self, front: FrontDoor, models: Any, settings: AdHocSettings) -> None:
        self.settings = settings
        self._front, self._models = front, models
        self._entries: dict[str, Entry] = {}  # by digest
        self._leaving: set[str] = set()  # digests that are forgotten as soon as no request runs with them
        self._begun: deque[float] = deque()  # when the latest new ones came
        self._self = secrets.token_hex(8)  # whose events are not news here
        self._names: Names | None = None  # for which the entries were looked through

    def entries(self) -> list[Entry]:
        """The least recently used, at any process, first."""
        return sorted(self._entries.values(), key=lambda entry: entry.used)

    def get(self, digest: str) -> Entry | None:
        return self._entries.get(digest)

    def _count_new(self) -> None:
        """Raises QuotaExceeded where too many new ones have come within a minute."""
        now = time.monotonic()
        while self._begun and now - self._begun[0] > MINUTE:
            self._begun.popleft()
        if len(self._begun) >= self.settings.rate:
            wait = max(1, math.ceil(MINUTE - (now - self._begun[0])))
            raise QuotaExceeded(f"{self.settings.rate} new merges of requests have begun within a minute", wait)
        self._begun.append(now)

    def take_in(self, plan: Plan, nbytes: int) -> None:
        """Keep a merge, for which others that no request uses may have to go. Raises QuotaExceeded; nothing goes then."""
        if plan.digest not in self._entries:
            unwanted = self._in_the_way(nbytes)
            self._count_new()
            for digest in unwanted:
                self._forget(digest)
            self._add(plan, nbytes)
            self._tell("add", plan.digest, plan=plan.to_json(), bytes=nbytes)

    def use(self, digest: str, on_miss: str = "wait", fallback: str | None = None) -> None:
        """A request wants a merge that is kept, and says what is to happen while it is not in memory."""
        entry = self._entries[digest]
        entry.used, entry.told = time.monotonic(), False
        artifact = self._front.artifacts.setdefault(digest, Artifact(entry.plan))
        name = Name(ADHOC, ADHOC, digest, entry.label, on_miss=on_miss, fallback=fallback)
        self._front.adhoc[entry.label] = name
        self._models.lora_requests[entry.label] = artifact.lora_request(entry.label)

    def sweep(self) -> None:
        """Forget what nobody has used for long, and tell the other processes what was used here."""
        now = time.monotonic()
        for digest, entry in list(self._entries.items()):
            if self._in_use(digest):
                entry.used, entry.told = now, False
            elif now - entry.used > self.settings.idle:
                self._forget(digest)
        for digest in list(self._leaving):
            if self._front.drop(digest):
                self._leaving.discard(digest)
                self._forget_in_workers(digest)
        if used := [entry.plan.digest for entry in self.entries() if not entry.told]:
            self._tell("use", digests=used)
            for digest in used:
                self._entries[digest].told = True

    def follow(self, names: Names) -> None:
        """Forget what is made of adapters that are gone, or are others now."""
        if names is self._names:
            return
        self._names = names
        hashes = content_hashes(names)
        for digest, entry in list(self._entries.items()):
            if not _made_of(entry.plan, hashes):
                self._forget(digest)

    def on_event(self, event: Message) -> None:
        """What another API process says: events of the kind EVENT."""
        if event["of"] == self._self:
            return
        match event["what"]:
            case "add":
                plan = Plan.from_json(event["plan"])
                known = self._names is not None and _made_of(plan, content_hashes(self._names))
                if plan.digest not in self._entries and known:
                    self._add(plan, int(event["bytes"]))
            case "use":
                for entry in filter(None, map(self._entries.get, event["digests"])):
                    entry.used = time.monotonic()
            case "forget":
                digest = event["digest"]
                if digest in self._entries and not self._in_use(digest):
                    leased = self._front.artifacts[digest].leased  # and so the workers have kept it
                    self._drop(digest)
                    if leased:
                        self._forget_in_workers(digest)

    def _add(self, plan: Plan, nbytes: int) -> None:
        self._entries[plan.digest] = entry = Entry(plan, nbytes, time.monotonic())
        self.use(plan.digest)
        entry.told = True  # who brought it tells of it

    def _in_the_way(self, nbytes: int) -> list[str]:
        """Those that have to go for another merge. Raises QuotaExceeded where too much is in use."""
        limits, count, total, unwanted = self.settings, len(self._entries), self._bytes() + nbytes, []
        for entry in self.entries():
            if count < limits.count and total <= limits.bytes:
                break
            if not self._in_use(entry.plan.digest):
                unwanted.append(entry.plan.digest)
                count, total = count - 1, total - entry.bytes
        if count >= limits.count or total > limits.bytes:
            raise QuotaExceeded(
                f"{len(self._entries)} merges of requests with up to {self._bytes():,} bytes are in use, of "
                f"{limits.count} and {limits.bytes:,} that may be",
                5,
            )
        return unwanted

    def _bytes(self) -> int:
        return sum(entry.bytes for entry in self._entries.values())

    def _in_use(self, digest: str) -> bool:
        artifact = self._front.artifacts.get(digest)
        return artifact is not None and artifact.users > 0

    def _forget(self, digest: str) -> None:
        """Here and everywhere."""
        self._drop(digest)
        self._tell("forget", digest)
        self._forget_in_workers(digest)

    def _forget_in_workers(self, digest: str) -> None:
        if digest not in self._entries and (self._names is None or digest not in self._names.plans):
            self._front.links.post("forget", digest=digest)

    def _drop(self, digest: str) -> None:
        entry = self._entries.pop(digest)
        self._front.adhoc.pop(entry.label, None)
        if self._front.known(entry.label) is None:
            self._models.lora_requests.pop(entry.label, None)
        if not self._front.drop(digest):
            self._leaving.add(digest)

    def _tell(self, what: str, digest: str = "", **fields: Any) -> None:
        label = f"{ADHOC}@{digest[:DIGITS_IN_NAMES]}" if digest else ""
        event = {"event": EVENT, "of": self._self, "what": what, "digest": digest, "label": label, **fields}
        self._front.links.all[0].post("tell", event=event)


def content_hashes(names: Names) -> dict[str, str]:
    """{name: content hash} of the adapters that can be merged."""
    hashes = {}
    for adapter in names.recipes.adapters:
        known = names.names.get(adapter)
        if known is not None and known.digest is not None:
            (planned,) = names.plans[known.digest].adapters.values()  # adapters of equal content share a plan
            hashes[adapter] = planned.content_hash
    return hashes


def _made_of(plan: Plan, hashes: Mapping[str, str]) -> bool:
    return all(hashes.get(adapter.name) == adapter.content_hash for adapter in plan.adapters.values())
