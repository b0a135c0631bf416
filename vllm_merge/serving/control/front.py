# SPDX-License-Identifier: Apache-2.0
"""The API process's half of the plugin: names, what they stand for now, and leases on it.

A name (recipe, alias, adapter) stands for an artifact, an artifact is made ready on every worker before a request enters the
engine, and while requests run it is leased, so that no worker lets go of it. A lease is kept a little longer than its last
request: the next one finds it without a message, and an aborted request has left the engine by then.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from vllm_merge.adapters.catalogue import Catalogue
from vllm_merge.errors import MergeError
from vllm_merge.recipe.plan import Plan
from vllm_merge.serving import compat
from vllm_merge.serving.control.control import ControlError, Message, WorkerLink
from vllm_merge.serving.control.links import Links
from vllm_merge.serving.control.names import Name, Names, resolve_names
from vllm_merge.serving.identity import lora_id, lora_path, parse_path
from vllm_merge.serving.requests import outcome
from vllm_merge.serving.telemetry.tracing import waiting

logger = logging.getLogger("vllm_merge")

LINGER_SECONDS = 2.0  # how long a lease outlives its last request
FAILURE_SECONDS = 10.0  # how long a failed merge is remembered before a request may try it again
PREPARE_SECONDS = 600.0  # how long a request waits for its artifact
MAX_ATTEMPTS = 8  # LoRA ids tried for one artifact


class ArtifactUnavailable(MergeError):
    """An artifact cannot be served now. `retry` says whether asking again may help, `retry_after` when, in seconds."""

    def __init__(self, message: str, *, retry: bool, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.retry, self.retry_after = retry, retry_after


@dataclass
class Artifact:
    """One artifact as this process knows it."""

    plan: Plan
    attempt: int = 0
    state: str = "cold"  # cold | preparing | ready | failed
    reason: str = ""
    retry_at: float = 0.0  # a failure that will not pass by itself is not tried again before this (time.monotonic)
    retry: bool = False  # whether the last failure may pass by itself
    retry_after: int | None = None
    failures: int = 0  # attempts that failed
    replies: list[Message] = field(default_factory=list)  # of the workers, when they had it ready
    users: int = 0
    leased: bool = False
    epoch: int = 0  # of the connections under which it was leased
    warming: asyncio.Task[None] | None = None
    broken: str = ""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    linger: asyncio.TimerHandle | None = None

    @property
    def name(self) -> str:
        return self.plan.artifact_name

    @property
    def facts(self) -> Mapping[str, Any]:
        """What the first worker says of it."""
        return {key: value for key, value in self.replies[0].items() if key != "steps"} if self.replies else {}

    @property
    def in_use(self) -> bool:
        """Whether it is leased, or may be in a moment: two of the same digest would give each other's lease back."""
        return self.users > 0 or self.leased or self.state == "preparing"

    def lora_request(self, label: str) -> Any:
        """vLLM's request for this artifact under one of its names."""
        digest = self.plan.digest
        return compat.lora_request(label, lora_id(digest, self.attempt), lora_path(digest, self.attempt))


class Holder:
    """A held lease: the request to give to vLLM, and a check that what it runs on is what was promised."""

    def __init__(self, front: FrontDoor, artifact: Artifact, label: str) -> None:
        self.artifact, self.lora_request = artifact, artifact.lora_request(label)
        self._front, self._attempt, self._alarms = front, artifact.attempt, front.links.alarms

    async def check(self) -> None:
        """To be called with an output in hand, before it is passed on. Raises ArtifactUnavailable.

        A worker rings its alarm before the step that lacks an artifact, so none is passed on that such a step gave. Only
        after an alarm, which is rare, is the worker asked whether it was for this request.
        """
        alarms = self._front.links.alarms
        if alarms != self._alarms:
            await self._front.look_for_broken(self.artifact, self._attempt)
            self._alarms = alarms
        if self.artifact.attempt != self._attempt:
            raise ArtifactUnavailable(self.artifact.broken or f"{self.artifact.name} was replaced", retry=True)


class FrontDoor:
    """Names to artifacts to leases, for one API process (or one offline program)."""

    def __init__(self, links: list[WorkerLink]) -> None:
        self.links = Links(links, self._lease_again)
        self.names: Mapping[str, Name] = {}
        self.adhoc: dict[str, Name] = {}
        """By label: merges that requests brought, beside the names of the file."""
        self.artifacts: dict[str, Artifact] = {}
        self._labels: dict[str, Name] = {}
        self._catalogue = Catalogue()

    @property
    def connected(self) -> bool:
        return self.links.connected

    # -- names ----------------------------------------------------------------------------------------------------------

    async def resolve(
        self, config: Path, registered: Mapping[str, str] | None = None, added: Mapping[str, Any] | None = None
    ) -> Names:
        """Read the recipe file and plan every name in it; nothing is changed yet. Raises UserInputError.

        registered, added: adapters and recipes beside the file's, as of `resolve_names`.
        """
        workers = await self.links.ask("hello")
        for fact in ("base_model_hash", "dtype", "max_lora_rank"):
            if len({worker[fact] for worker in workers}) > 1:
                folder = self.links.all[0].path.parent
                raise MergeError(f"the workers in {folder} differ in {fact}: are they of two servers?")
        return await asyncio.to_thread(resolve_names, config, workers[0], self._catalogue, registered or {}, added)

    def adopt(self, resolved: Names) -> None:
        """Let every name stand for what was resolved, all at once. Requests that run keep the artifact they have."""
        kept = {*resolved.plans, *(name.digest for name in self.adhoc.values())}
        for digest in set(self.artifacts) - kept:
            if not self.artifacts[digest].in_use:
                del self.artifacts[digest]
        for digest, plan in resolved.plans.items():
            self.artifacts.setdefault(digest, Artifact(plan))
        self.names = resolved.names
        own = (name for name in self.names.values() if name.digest is not None)
        self._labels = {name.label: name for name in own if name.kind not in ("alias", "experiment")}

    async def load(self, config: Path, registered: Mapping[str, str] | None = None) -> None:
        """`resolve` and `adopt`."""
        self.adopt(await self.resolve(config, registered))

    def known(self, name: str) -> Name | None:
        """What a name of ours (of a recipe, alias, adapter or artifact) is; None for others."""
        return self.names.get(name) or self._labels.get(name) or self.adhoc.get(name)

    def find(self, name: str) -> tuple[Artifact, str] | None:
        """The artifact that a model name (of a recipe, alias, adapter or artifact) stands for, and its label; None if the
        name is not ours. Raises ArtifactUnavailable for a name of ours that has no artifact.
        """
        known = self.known(name)
        if known is None:
            return None
        if known.digest is None:
            raise ArtifactUnavailable(known.reason, retry=False)
        return self.artifacts[known.digest], known.label

    def lora_requests(self) -> dict[str, Any]:
        """{name: LoRARequest} of every name of the file that has an artifact, and of the artifacts' labels."""
        return self._named() | {label: self._request(name) for label, name in self._labels.items()}

    def listed(self) -> dict[str, Any]:
        """{name: LoRARequest} for /v1/models: the names that people wrote, not the artifacts behind them, and what requests
        brought, which has no other name.
        """
        return self._named() | {label: self._request(name) for label, name in self.adhoc.items()}

    def drop(self, digest: str) -> bool:
        """Forget an artifact that nothing stands for any more; False while a request runs with it, or it is being prepared."""
        artifact = self.artifacts.get(digest)
        stands = (name.digest == digest for name in (*self.names.values(), *self.adhoc.values()))
        if artifact is None or any(stands):
            return True
        if artifact.users or artifact.state == "preparing":
            return False
        self._give_back(artifact)
        del self.artifacts[digest]
        return True

    def _named(self) -> dict[str, Any]:
        return {name.name: self._request(name) for name in self.names.values() if name.digest is not None}

    def _request(self, name: Name) -> Any:
        assert name.digest is not None
        return self.artifacts[name.digest].lora_request(name.label)

    def owns(self, lora_path: str) -> bool:
        return parse_path(lora_path) is not None

    # -- readiness ------------------------------------------------------------------------------------------------------

    async def warm_eager(self, resolved: Names) -> None:
        """Make every `load: eager` recipe ready on every worker; one that fails is logged and answers with its reason.

        Raises MergeError for one with `on_error: stop`.
        """
        for name, recipe in resolved.recipes.recipes.items():
            if recipe.load != "eager":
                continue
            known = resolved.names[name]
            reason: object = known.reason
            if known.digest is not None:
                artifact = self.artifacts.setdefault(known.digest, Artifact(resolved.plans[known.digest]))
                try:
                    await self.ready(artifact)
                    logger.info("%s is ready as %s", name, known.label)
                    continue
                except ArtifactUnavailable as error:
                    reason = error
            if recipe.on_error == "stop":
                raise MergeError(f"{resolved.recipes.path}: recipes.{name}: on_error: stop: {reason}")
            logger.error("recipe %s is not served: %s", name, reason)

    async def ready(self, artifact: Artifact) -> None:
        """Return once every worker holds the artifact. Raises ArtifactUnavailable."""
        if not self._has(artifact):
            await self._prepare(artifact, lease=False)

    def _has(self, artifact: Artifact) -> bool:
        """Whether every worker holds the artifact for this process."""
        return artifact.leased and artifact.epoch == self.links.epoch and self.connected

    @asynccontextmanager
    async def hold(self, artifact: Artifact, label: str, *, wait: bool = True) -> AsyncIterator[None]:
        """Lease an artifact. Without `wait` one that is not in memory raises ArtifactUnavailable, and is warmed meanwhile."""
        if not wait and not self._has(artifact):
            await self._need_near(artifact)
        async with self._leased(artifact, label):
            yield

    async def _need_near(self, artifact: Artifact) -> None:
        if artifact.state == "failed" and time.monotonic() < artifact.retry_at:
            raise ArtifactUnavailable(artifact.reason, retry=False)
        try:
            replies = await self.links.ask("near", digest=artifact.plan.digest)
        except ControlError as error:
            raise ArtifactUnavailable(f"{artifact.name}: {error}", retry=True) from None
        if not all(reply["near"] for reply in replies):
            self._warm(artifact)
            seconds = max(reply["retry_after"] for reply in replies)
            raise ArtifactUnavailable(f"{artifact.name} is being merged", retry=True, retry_after=seconds)

    def _warm(self, artifact: Artifact) -> None:
        """Make an artifact ready in the background, whoever else comes or goes."""

        async def warm() -> None:
            with contextlib.suppress(ArtifactUnavailable):  # the next request is told
                await self.ready(artifact)

        if artifact.warming is None or artifact.warming.done():
            artifact.warming = asyncio.ensure_future(warm())

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
        try:
            async with self._leased(artifact, label):
                holder = Holder(self, artifact, label)
                yield holder
                await holder.check()
        except ArtifactUnavailable as error:
            outcome.note_error(error)
            raise

    @asynccontextmanager
    async def _leased(self, artifact: Artifact, label: str) -> AsyncIterator[None]:
        artifact.users += 1
        if artifact.linger is not None:
            artifact.linger.cancel()
            artifact.linger = None
        outcome.note_label(label)
        try:
            if not self._has(artifact):
                # Goes on when this request is cancelled, so that a lease which comes late is seen and given back.
                preparing = asyncio.ensure_future(self._prepare(artifact, lease=True))
                preparing.add_done_callback(lambda done: done.cancelled() or done.exception())
                with waiting(label) as wait:
                    await asyncio.shield(preparing)
                    wait.came(artifact.replies, [link.facts for link in self.links.all])
            yield
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
            self.links.post("release", digest=artifact.plan.digest)

    async def _prepare(self, artifact: Artifact, *, lease: bool) -> None:
        failures = artifact.failures
        try:
            async with asyncio.timeout(PREPARE_SECONDS), artifact.lock:
                if artifact.state == "failed" and artifact.failures > failures:
                    # What this request waited for has failed or was cancelled: it is not tried once more for every one that waited.
                    raise ArtifactUnavailable(artifact.reason, retry=artifact.retry, retry_after=artifact.retry_after)
                await self._prepare_alone(artifact, lease)
        except TimeoutError:
            reason = f"{artifact.name} was not ready within {PREPARE_SECONDS:.0f} s"
            raise ArtifactUnavailable(reason, retry=True) from None

    async def _prepare_alone(self, artifact: Artifact, lease: bool) -> None:
        if self._has(artifact):
            return
        artifact.leased = False
        if artifact.state == "failed" and time.monotonic() < artifact.retry_at:
            raise ArtifactUnavailable(artifact.reason, retry=False)
        artifact.state, artifact.reason, artifact.epoch = "preparing", "", self.links.epoch
        try:
            replies = await self._prepare_everywhere(artifact, lease)
        except ControlError as error:
            self._failed(artifact, f"{artifact.name}: {error}", error.kind != "failed", error.retry_after)
        except BaseException:
            artifact.state = "cold"
            raise
        hashes = {reply["tensors_sha256"] for reply in replies} - {None}  # None: not taken yet
        if len(hashes) > 1:
            logger.warning("%s has different bytes on different workers: %s", artifact.name, sorted(hashes))
        artifact.state, artifact.replies, artifact.leased = "ready", replies, lease
        self._linger(artifact)  # if whoever wanted it has left meanwhile

    async def _prepare_everywhere(self, artifact: Artifact, lease: bool) -> list[Message]:
        plan = artifact.plan.to_json()
        for _ in range(MAX_ATTEMPTS):
            wanted = lora_id(artifact.plan.digest, artifact.attempt)
            try:
                replies = await self.links.try_all("prepare", plan=plan, lora_id=wanted, lease=lease)
            except asyncio.CancelledError:  # it took too long: what comes later is not wanted any more
                if lease:
                    self.links.post("release", digest=artifact.plan.digest)
                raise
            errors = [reply for reply in replies if isinstance(reply, BaseException)]
            if not errors:
                return [reply for reply in replies if not isinstance(reply, BaseException)]
            if lease:
                for link, reply in zip(self.links.all, replies, strict=True):
                    if not isinstance(reply, BaseException):
                        link.post("release", digest=artifact.plan.digest)
            if not all(isinstance(error, ControlError) and error.kind == "conflict" for error in errors):
                raise next(e for e in errors if not (isinstance(e, ControlError) and e.kind == "conflict"))
            artifact.attempt += 1
        raise ControlError("failed", f"no free LoRA id in {MAX_ATTEMPTS} attempts")

    def _failed(self, artifact: Artifact, reason: str, retry: bool, retry_after: int | None) -> NoReturn:
        artifact.state, artifact.reason = "failed", reason
        artifact.retry, artifact.retry_after, artifact.failures = retry, retry_after, artifact.failures + 1
        artifact.retry_at = 0.0 if retry else time.monotonic() + FAILURE_SECONDS
        raise ArtifactUnavailable(reason, retry=retry, retry_after=retry_after)

    # -- workers ----------------------------------------------------------------------------------------------------------

    async def _lease_again(self) -> None:
        """What requests use at this moment, after a connection was made again."""
        for artifact in list(self.artifacts.values()):
            if artifact.users:
                with contextlib.suppress(ArtifactUnavailable):  # its requests find out by the alarm
                    await self._prepare(artifact, lease=True)

    async def look_for_broken(self, artifact: Artifact, attempt: int) -> None:
        """After an alarm: was it for this artifact? Raises ArtifactUnavailable if nobody can say."""
        number = lora_id(artifact.plan.digest, attempt)
        try:
            replies = await self.links.ask("broken", lora_id=number)
        except ControlError as error:
            raise ArtifactUnavailable(f"{artifact.name}: {error}", retry=True) from None
        for reason in (reply["reason"] for reply in replies):
            if reason is not None:
                self._broken(artifact, attempt, reason)

    def _broken(self, artifact: Artifact, attempt: int, reason: str) -> None:
        if artifact.attempt == attempt:
            artifact.broken = reason
            artifact.attempt += 1
            self._give_back(artifact)

    def on_event(self, event: Message) -> None:
        """A worker served a request without its artifact: that request fails, and the artifact gets a new id and path."""
        artifact = self.artifacts.get(event.get("digest", ""))
        if artifact is None or event["event"] != "broken":
            return
        if event["lora_id"] == lora_id(artifact.plan.digest, artifact.attempt):
            self._broken(artifact, artifact.attempt, event["reason"])

    # -- for people -----------------------------------------------------------------------------------------------------

    async def describe_workers(self) -> list[Message]:
        replies = await self.links.try_all("status")
        return [reply if isinstance(reply, dict) else {"error": str(reply)} for reply in replies]
