# SPDX-License-Identifier: Apache-2.0
"""The API process's half of the plugin: names, what they stand for now, and leases on it.

A name (recipe, alias, adapter) stands for an artifact, an artifact is made ready on every worker before a request enters the
engine, and while requests run it is leased, so that no worker lets go of it. A lease is kept a little longer than its last
request: the next one finds it without a message, and an aborted request has left the engine by then.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_merge.adapters.catalogue import Catalogue
from vllm_merge.errors import MergeError
from vllm_merge.recipe.plan import Plan
from vllm_merge.serving import compat
from vllm_merge.serving.control import ControlError, Message, WorkerLink
from vllm_merge.serving.identity import lora_id, lora_path, parse_path
from vllm_merge.serving.names import Name, Names, resolve_names

logger = logging.getLogger("vllm_merge")

LINGER_SECONDS = 2.0  # how long a lease outlives its last request
FAILURE_SECONDS = 10.0  # how long a failed merge is remembered before a request may try it again
PREPARE_SECONDS = 600.0  # how long a request waits for its artifact
MAX_ATTEMPTS = 8  # LoRA ids tried for one artifact


class ArtifactUnavailable(MergeError):
    """An artifact cannot be served now. `retry` says whether asking again may help."""

    def __init__(self, message: str, *, retry: bool) -> None:
        super().__init__(message)
        self.retry = retry


@dataclass
class Artifact:
    """One artifact as this process knows it."""

    plan: Plan
    attempt: int = 0
    state: str = "cold"  # cold | preparing | ready | failed
    reason: str = ""
    retry_at: float = 0.0  # a failure that will not pass by itself is not tried again before this (time.monotonic)
    facts: Mapping[str, Any] = field(default_factory=dict)
    users: int = 0
    leased: bool = False
    broken: str = ""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    linger: asyncio.TimerHandle | None = None

    @property
    def name(self) -> str:
        return self.plan.artifact_name

    def lora_request(self, label: str) -> Any:
        """vLLM's request for this artifact under one of its names."""
        digest = self.plan.digest
        return compat.lora_request(label, lora_id(digest, self.attempt), lora_path(digest, self.attempt))


@dataclass(frozen=True)
class Holder:
    """A held lease: the request to give to vLLM, and a check that what it runs on is what was promised."""

    artifact: Artifact
    attempt: int
    lora_request: Any

    def check(self) -> None:
        if self.artifact.attempt != self.attempt:
            raise ArtifactUnavailable(self.artifact.broken or f"{self.artifact.name} was replaced", retry=True)


class FrontDoor:
    """Names to artifacts to leases, for one API process (or one offline program)."""

    def __init__(self, links: list[WorkerLink]) -> None:
        self._links = links
        self.names: Mapping[str, Name] = {}
        self.artifacts: dict[str, Artifact] = {}
        self._labels: dict[str, Name] = {}
        self._catalogue = Catalogue()

    @property
    def connected(self) -> bool:
        return all(link.connected for link in self._links)

    # -- names ----------------------------------------------------------------------------------------------------------

    async def resolve(self, config: Path, registered: Mapping[str, str] | None = None) -> Names:
        """Read the recipe file and plan every name in it; nothing is changed yet. Raises UserInputError."""
        workers = await asyncio.gather(*(link.call("hello") for link in self._links))
        for fact in ("base_model_hash", "dtype", "max_lora_rank"):
            if len({worker[fact] for worker in workers}) > 1:
                raise MergeError(
                    f"the workers in {self._links[0].path.parent} differ in {fact}: are they of two servers?"
                )
        return await asyncio.to_thread(resolve_names, config, workers[0], self._catalogue, registered or {})

    def adopt(self, resolved: Names) -> None:
        """Let every name stand for what was resolved, all at once. Requests that run keep the artifact they have."""
        unused = set(self.artifacts) - set(resolved.plans)
        for digest in unused:
            if not self.artifacts[digest].users and not self.artifacts[digest].leased:
                del self.artifacts[digest]
        for digest, plan in resolved.plans.items():
            self.artifacts.setdefault(digest, Artifact(plan))
        self.names = resolved.names
        self._labels = {n.label: n for n in self.names.values() if n.digest is not None and n.kind != "alias"}

    async def load(self, config: Path, registered: Mapping[str, str] | None = None) -> None:
        """`resolve` and `adopt`."""
        self.adopt(await self.resolve(config, registered))

    def find(self, name: str) -> tuple[Artifact, str] | None:
        """The artifact that a model name (of a recipe, alias, adapter or artifact) stands for, and its label; None if the
        name is not ours. Raises ArtifactUnavailable for a name of ours that has no artifact.
        """
        known = self.names.get(name) or self._labels.get(name)
        if known is None:
            return None
        if known.digest is None:
            raise ArtifactUnavailable(known.reason, retry=False)
        return self.artifacts[known.digest], known.label

    def lora_requests(self) -> dict[str, Any]:
        """{name: LoRARequest} of every name that has an artifact, and of the artifacts' labels."""
        return self.listed() | {label: self._request(name) for label, name in self._labels.items()}

    def listed(self) -> dict[str, Any]:
        """{name: LoRARequest} for /v1/models: the names that people wrote, not the artifacts behind them."""
        return {name.name: self._request(name) for name in self.names.values() if name.digest is not None}

    def _request(self, name: Name) -> Any:
        assert name.digest is not None
        return self.artifacts[name.digest].lora_request(name.label)

    def owns(self, lora_path: str) -> bool:
        return parse_path(lora_path) is not None

    # -- readiness ------------------------------------------------------------------------------------------------------

    async def warm_eager(self, resolved: Names) -> None:
        """Make every `load: eager` recipe ready on every worker; one that fails is logged and answers with its reason."""
        for name, recipe in resolved.recipes.recipes.items():
            digest = resolved.names[name].digest
            if recipe.load != "eager" or digest is None:
                continue
            artifact = self.artifacts.setdefault(digest, Artifact(resolved.plans[digest]))
            try:
                await self.ready(artifact)
                logger.info("%s is ready as %s", name, resolved.names[name].label)
            except ArtifactUnavailable as error:
                logger.error("recipe %s is not served: %s", name, error)

    async def ready(self, artifact: Artifact) -> None:
        """Return once every worker holds the artifact. Raises ArtifactUnavailable."""
        if not artifact.leased or not self.connected:
            await self._prepare(artifact, lease=False)

    def lease(self, lora_request: Any) -> AbstractAsyncContextManager[Holder] | None:
        """A lease for a request of ours, None for others."""
        digest = parse_path(lora_request.lora_path) if lora_request is not None else None
        if digest is None:
            return None
        if digest not in self.artifacts:
            raise ArtifactUnavailable(f"{lora_request.lora_name} is not an artifact of this server", retry=False)
        return self._lease(self.artifacts[digest], lora_request.lora_name)

    @asynccontextmanager
    async def _lease(self, artifact: Artifact, label: str) -> AsyncIterator[Holder]:
        artifact.users += 1
        if artifact.linger is not None:
            artifact.linger.cancel()
            artifact.linger = None
        try:
            if not artifact.leased or not self.connected:
                # Goes on when this request is cancelled, so that a lease which comes late is seen and given back.
                preparing = asyncio.ensure_future(self._prepare(artifact, lease=True))
                preparing.add_done_callback(lambda done: done.cancelled() or done.exception())
                await asyncio.shield(preparing)
            holder = Holder(artifact, artifact.attempt, artifact.lora_request(label))
            yield holder
            holder.check()
        finally:
            artifact.users -= 1
            self._linger(artifact)

    def _linger(self, artifact: Artifact) -> None:
        if artifact.users == 0 and artifact.leased and artifact.linger is None:
            loop = asyncio.get_running_loop()
            artifact.linger = loop.call_later(LINGER_SECONDS, self._release, artifact)

    def _release(self, artifact: Artifact) -> None:
        artifact.linger = None
        if artifact.users == 0:
            self._give_back(artifact)

    def _give_back(self, artifact: Artifact) -> None:
        if artifact.leased:
            artifact.leased = False
            for link in self._links:
                link.post("release", digest=artifact.plan.digest)

    async def _prepare(self, artifact: Artifact, *, lease: bool) -> None:
        async with artifact.lock:
            if artifact.leased and self.connected:
                return
            artifact.leased = False
            if artifact.state == "failed" and time.monotonic() < artifact.retry_at:
                raise ArtifactUnavailable(artifact.reason, retry=False)
            artifact.state, artifact.reason = "preparing", ""
            try:
                async with asyncio.timeout(PREPARE_SECONDS):
                    replies = await self._prepare_everywhere(artifact, lease)
            except TimeoutError:
                self._failed(artifact, f"{artifact.name} was not ready within {PREPARE_SECONDS:.0f} s", retry=True)
            except ControlError as error:
                self._failed(artifact, f"{artifact.name}: {error}", retry=error.kind != "failed")
            except BaseException:
                artifact.state = "cold"
                raise
            hashes = {reply["tensors_sha256"] for reply in replies}
            if len(hashes) > 1:
                logger.warning("%s has different bytes on different workers: %s", artifact.name, sorted(hashes))
            artifact.state, artifact.facts, artifact.leased = "ready", replies[0], lease
            self._linger(artifact)  # if whoever wanted it has left meanwhile

    async def _prepare_everywhere(self, artifact: Artifact, lease: bool) -> list[Message]:
        plan = artifact.plan.to_json()
        for _ in range(MAX_ATTEMPTS):
            wanted = lora_id(artifact.plan.digest, artifact.attempt)
            calls = (link.call("prepare", plan=plan, lora_id=wanted, lease=lease) for link in self._links)
            replies = await asyncio.gather(*calls, return_exceptions=True)
            errors = [reply for reply in replies if isinstance(reply, BaseException)]
            if not errors:
                return [reply for reply in replies if not isinstance(reply, BaseException)]
            if lease:
                for link, reply in zip(self._links, replies, strict=True):
                    if not isinstance(reply, BaseException):
                        link.post("release", digest=artifact.plan.digest)
            if not all(isinstance(error, ControlError) and error.kind == "conflict" for error in errors):
                raise next(e for e in errors if not (isinstance(e, ControlError) and e.kind == "conflict"))
            artifact.attempt += 1
        raise ControlError("failed", f"no free LoRA id in {MAX_ATTEMPTS} attempts")

    def _failed(self, artifact: Artifact, reason: str, *, retry: bool) -> None:
        artifact.state, artifact.reason = "failed", reason
        artifact.retry_at = 0.0 if retry else time.monotonic() + FAILURE_SECONDS
        raise ArtifactUnavailable(reason, retry=retry)

    def on_event(self, event: Message) -> None:
        """A worker served a request without its artifact: that request fails, and the artifact gets a new id and path."""
        artifact = self.artifacts.get(event.get("digest", ""))
        if artifact is None or event["event"] != "broken":
            return
        if event["lora_id"] == lora_id(artifact.plan.digest, artifact.attempt):
            artifact.broken = event["reason"]
            artifact.attempt += 1
            self._give_back(artifact)

    # -- for people -----------------------------------------------------------------------------------------------------

    def describe_names(self) -> list[dict[str, Any]]:
        rows = []
        for known in self.names.values():
            artifact = self.artifacts.get(known.digest or "")
            rows.append(
                {
                    "name": known.name,
                    "kind": known.kind,
                    "artifact": known.label or None,
                    "digest": known.digest,
                    "state": artifact.state if artifact else "failed",
                    "reason": (artifact.reason if artifact else known.reason) or None,
                    **{key: artifact.facts[key] for key in ("rank", "bytes", "seconds") if artifact and artifact.facts},
                }
            )
        return rows

    async def describe_workers(self) -> list[Message]:
        replies = await asyncio.gather(*(link.call("status") for link in self._links), return_exceptions=True)
        return [reply if isinstance(reply, dict) else {"error": str(reply)} for reply in replies]
