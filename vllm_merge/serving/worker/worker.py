# SPDX-License-Identifier: Apache-2.0
"""A worker's half of the plugin: merges plans in the background and hands vLLM's loader what is ready.

One thread merges (on the worker's own device, one merge at a time), one brings artifacts back from the tiers below the cache,
one serves the control socket, and vLLM's own thread comes by in `load` and `fill`. For requests of ours these read no file,
allocate nothing of an adapter's size and never raise: one whose artifact is not here (its lease was broken) gets an adapter
that changes nothing, and every API process learns of it before the request's next token, so that the request fails.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import logging
import os
import queue
import socket
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_merge.adapters.base_model import base_model_hash
from vllm_merge.artifact import MergedAdapter
from vllm_merge.errors import MergeCancelled, MergeError
from vllm_merge.plan_runner import run_plan
from vllm_merge.recipe.plan import Plan
from vllm_merge.serving import compat
from vllm_merge.serving.control.control import ControlError, ControlServer, Message, Session
from vllm_merge.serving.control.owner import StateOwner
from vllm_merge.serving.identity import FIRST_ID, parse_path
from vllm_merge.serving.memory.arena import Arena
from vllm_merge.serving.memory.export import MAX_PIECE, Export
from vllm_merge.serving.memory.hasher import Hasher
from vllm_merge.serving.memory.packed import SideStream
from vllm_merge.serving.memory.residency import ArtifactStore, OutOfBudget, ResidentArtifact
from vllm_merge.serving.memory.slots import SlotLayout, flat_copy
from vllm_merge.serving.memory.sources import SourceCache
from vllm_merge.serving.memory.tiers import Tiers
from vllm_merge.serving.settings import WorkerSettings
from vllm_merge.serving.telemetry.metrics_samples import counted_samples, described_samples
from vllm_merge.serving.telemetry.metrics_tally import Sample, Tally
from vllm_merge.serving.telemetry.timeline import Timeline
from vllm_merge.serving.worker.alarm import Alarm, alarm_path
from vllm_merge.serving.worker.claims import Claims
from vllm_merge.serving.worker.jobs import Job, Line, TooManyMerges
from vllm_merge.serving.worker.news import News
from vllm_merge.serving.worker.pace import Pace
from vllm_merge.serving.worker.sleep import Wakefulness
from vllm_merge.serving.worker.warm_up import warm_up

logger = logging.getLogger("vllm_merge.worker")

SHAPES_KEPT = 32
FAILURES_KEPT = 100  # reasons that the status tells
ROOM_SECONDS = 10.0  # how long an artifact waits for a cache that is full of what requests hold
ROOM_LOOK_SECONDS = 0.05


@dataclass
class Held:
    """What a session has: leases, and the digests that it asked for and did not give back since."""

    leases: set[str] = field(default_factory=set)
    wanted: set[str] = field(default_factory=set)


class WorkerService:
    """Serves one worker process; create it when the model's LoRA slots exist."""

    def __init__(
        self, worker_manager: Any, vllm_config: Any, socket_path: Path, affinity: Collection[int] | None
    ) -> None:
        self._manager = worker_manager
        self._device = torch.device(worker_manager.device)
        self._dtype = compat.slot_dtype(worker_manager)
        if self._device.type == "cpu":
            compat.mend_prompt_logprobs()
            if compat.mend_rows_without_lora():
                logger.info("mended vLLM's CPU LoRA kernels, which give base-model rows the last slot's adapter")
        self._base_model = str(vllm_config.model_config.model)
        settings = WorkerSettings.read()
        self._time_limit = settings.time_limit
        server = f"{socket.gethostname()}:{socket_path.parent}".replace(" ", "_")
        self._tiers = Tiers(settings, self._device, server)
        self._news = News(self._send_news, {key: compat.place(vllm_config)[key] for key in ("engine", "rank")})
        self.store = ArtifactStore(settings.cache_bytes, self._evicted, lambda: compat.registered_bytes(worker_manager))
        gpu = self._device.type == "cuda"
        total = torch.cuda.get_device_properties(self._device).total_memory if gpu else None
        self._workspace = settings.workspace_bytes_on(total)
        self._arena = Arena(self._device, settings.cache_bytes + settings.merge_bytes_on(total))
        self._sources = SourceCache(settings.source_bytes, self._device)
        try:
            with self._arena.use():
                warm_up(self._device, self._dtype)
        except Exception:  # the model can be served without merges; each of them will say what is wrong
            logger.exception("the merges that warm up the device failed")
        self._arena.take(0)
        self._jobs: dict[str, Job] = {}
        self._claims = Claims(self._in_use)
        self._alarm = Alarm(alarm_path(socket_path))
        self._served: Counter[str] = Counter()  # artifacts made ready, by where they were: cache, host, disk or merge
        self._tally = Tally()
        self._pace = Pace()
        self._export: tuple[weakref.ref[ResidentArtifact], Export] | None = None  # of what is being downloaded
        self._export_stream = SideStream(self._device)
        self._sessions: dict[Session, Held] = {}
        self._owner = StateOwner()
        self._wakefulness = Wakefulness()
        self._merges = 0
        self._failures: dict[str, str] = {}  # digest -> why its last merge failed, latest last
        self._zero = compat.zero_lora_model(worker_manager, 1)
        buffers = compat.slot_buffers(worker_manager)
        self._layout = SlotLayout(buffers) if buffers else None
        if self._layout is not None:  # no slot is in use yet; on a GPU this compiles the kernel, outside of any step
            self._layout.fill(0, self._layout.source([None] * len(self._layout.buffers)))
        self._affinity = affinity
        self._hello: Message = {
            "pid": os.getpid(),
            **compat.place(vllm_config),
            "max_lora_rank": compat.max_rank(worker_manager),
            "max_loras": len(compat.slot_ids(worker_manager)),
            "dtype": str(self._dtype).removeprefix("torch."),
            "device": str(self._device),
            "device_name": torch.cuda.get_device_name(self._device) if gpu else "cpu",
            "base_model": self._base_model,
            "base_model_hash": base_model_hash(self._base_model),
        }
        self._line = Line(settings.queue)
        self._fitting: set[tuple[Any, ...]] = set()  # modules and shapes of what was found to fit
        self._hasher = Hasher(self._device)
        self._after = ThreadPoolExecutor(1, "vllm-merge-after", initializer=self._unbind)  # what follows a merge
        self._cold: queue.SimpleQueue[Job] = queue.SimpleQueue()  # to be looked for in the tiers
        self._server = ControlServer(socket_path, self)

    def start(self) -> None:
        self._server.start()
        threading.Thread(target=self._merge_forever, name="vllm-merge", daemon=True).start()
        if self._tiers.any:
            threading.Thread(target=self._look_forever, name="vllm-merge-tiers", daemon=True).start()
            self._tiers.start()

    def stop(self) -> None:
        for job in list(self._jobs.values()):
            job.cancelled.set()
        self._server.stop()

    # -- vLLM's thread --------------------------------------------------------------------------------------------------

    def load(self, lora_request: Any) -> Any | None:
        """The LoRAModel of a request of ours, None for others.

        Raises only for a request that is not ours and has an id of ours, before anything is scheduled with it
        (`load_inplace` under a name of ours): other weights would answer for an artifact.
        """
        digest = parse_path(lora_request.lora_path)
        if digest is None:
            if lora_request.lora_int_id >= FIRST_ID:
                raise ValueError(
                    f"{lora_request.lora_name} is a name of vllm-merge; load the adapter under another one"
                )
            return None
        try:
            artifact = self.store.get(digest)
            if artifact is not None:  # vLLM never keeps a tensor of it, however many adapters it registers
                model = compat.marker_lora_model(self._manager, lora_request.lora_int_id)
                model.vllm_merge_service, model.vllm_merge_digest = self, digest
                return model
            reason = f"{lora_request.lora_name} was not in memory when a request needed it"
        except Exception as error:
            logger.exception("could not hand %s to vLLM", lora_request.lora_name)
            reason = f"{lora_request.lora_name} could not be handed to vLLM: {error}"
        self._say_broken(digest, lora_request.lora_int_id, reason)
        return self._zero.clone(lora_request.lora_int_id)

    def fill(self, lora_model: Any, slot: int) -> Any | None:
        """Fill a slot with the artifact that a LoRAModel stands for. Never raises.

        True: done. A LoRAModel: vLLM is to copy from it. None: from the one that stands there, which changes nothing.
        """
        digest = lora_model.vllm_merge_digest
        try:
            artifact = self.store.peek(digest)
            if artifact is not None:
                if artifact.storage.is_cuda:  # its memory may be given back before this stream has read it
                    stream = torch.cuda.current_stream(artifact.storage.device)
                    for storage in artifact.storages:
                        storage.record_stream(stream)
                if artifact.source is None or self._layout is None:
                    return compat.packed_lora_model(self._manager, lora_model.id, artifact.factors)
                self._layout.fill(slot, artifact.source)
                return True
            reason = "it was not in memory when its slot was filled"
        except Exception as error:
            logger.exception("could not fill slot %d", slot)
            reason = f"its slot could not be filled: {error}"
        self._say_broken(digest, lora_model.id, reason)
        return None

    def fall_asleep(self) -> None:
        """Stop working on the device and give back what no request holds; it comes back from the tiers, or is merged anew.

        Slots lie in memory that sleep may empty, so nothing of ours stays in one: vLLM asks again with the next step.
        """
        if not self._wakefulness.fall_asleep():
            logger.warning("a merge goes on although vLLM falls asleep")
        compat.remove_adapters(self._manager, FIRST_ID)
        for row in self.store.describe()["artifacts"]:
            self.store.evict(row["digest"])
        self._arena.give_back()

    def wake_up(self, tags: Sequence[str] | None) -> None:
        self._wakefulness.wake_up(tags, lambda: self._arena.take(self.store.describe()["bytes"]))

    def _say_broken(self, digest: str, lora_id: int, reason: str) -> None:
        """The id is used up: whoever asks next gets another one, and requests that run under it fail.

        All that an API process looks at before it passes a token on is done when this returns, before the step runs.
        """
        self._claims.break_(lora_id, reason)
        self._alarm.ring()
        logger.error("artifact %s: %s; its requests fail", digest[:12], reason)
        event = {"event": "broken", "digest": digest, "lora_id": lora_id, "reason": reason}
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server is going down
            self._server.loop.call_soon_threadsafe(self._broadcast, event)

    def _in_use(self, lora_id: int, digest: str) -> bool:
        return self.store.holds(digest) or digest in self._jobs or compat.is_registered(self._manager, lora_id)

    # -- control thread -------------------------------------------------------------------------------------------------

    async def handle(self, session: Session, op: str, message: Message) -> Message:
        held = self._sessions.setdefault(session, Held())
        if (answer := await self._owner.handle(session, op, message)) is not None:
            return answer
        match op:
            case "hello":
                return self._hello
            case "prepare":
                return await self._prepare(session, message)
            case "release":
                held.wanted.discard(message["digest"])
                if message["digest"] in held.leases:
                    held.leases.discard(message["digest"])
                    self.store.release(message["digest"])
                return {}
            case "near":
                near = self.store.peek(message["digest"]) is not None or self._tiers.near(message["digest"])
                return {"near": near, "retry_after": self._line.retry_after()}
            case "broken":
                return {"reason": self._claims.reason(int(message["lora_id"]))}
            case "evict":  # which may copy the artifact to the tiers below
                return {"evicted": await asyncio.to_thread(self.store.evict, message["digest"])}
            case "pin":
                return self._pin(message["digest"])
            case "unpin":
                return {"unpinned": self.store.unpin(message["digest"])}
            case "cancel":
                return {"cancelled": self._cancel(message["digest"])}
            case "report":
                return self._report(message["digest"])
            case "export":
                return await asyncio.to_thread(self._exporting, message)
            case "forget":  # nobody will ask for it again
                return {"forgotten": await asyncio.to_thread(self._forget, message["digest"])}
            case "tell":  # one API process to all
                self._tell(message["event"])
                return {}
            case "status":
                return self._status()
            case "metrics":
                return {"samples": self._samples(), "failed": list(self._failures)}
        raise ControlError("failed", f"unknown operation {op!r}")

    def closed(self, session: Session) -> None:
        for digest in self._sessions.pop(session, Held()).leases:
            self.store.release(digest)
        self._owner.closed(session)

    def _pin(self, digest: str) -> Message:
        try:
            self.store.pin(digest)
        except OutOfBudget as error:
            raise ControlError("busy", str(error)) from None
        except MergeError as error:
            raise ControlError("failed", str(error)) from None
        return {}

    def _evicted(self, artifact: ResidentArtifact) -> None:
        self._news.evicted(artifact)
        self._tiers.demote(artifact)

    def _report(self, digest: str) -> Message:
        """What is known of an artifact in the cache; nothing where it is not there."""
        artifact = self.store.peek(digest)
        if artifact is None:
            return {"found": False}
        ranks = {module: a.shape[0] for module, (a, _) in artifact.factors.items()}
        facts = {
            key: getattr(artifact, key) for key in ("name", "rank", "seconds", "origin", "tensors_sha256", "report")
        }
        return {"found": True, "digest": digest, "bytes": artifact.nbytes, "ranks": ranks, **facts}

    def _exporting(self, message: Message) -> Message:
        """A piece of an artifact's files; without `offset` the small files, and how large the weights' file is.

        The session holds a lease on it.
        """

        def export() -> Message:
            artifact = self.store.peek(message["digest"])
            if artifact is None:
                raise ControlError("failed", f"artifact {message['digest'][:12]} is not in the cache")
            of, made = self._export or (None, None)
            if of is None or made is None or of() is not artifact:  # one that came back may lie in another order
                made = Export.of(artifact, self._base_model)
                self._export = weakref.ref(artifact), made
            if "offset" not in message:
                return {"texts": made.texts, "size": made.size}
            size = min(int(message["size"]), MAX_PIECE)
            piece = made.read(artifact, int(message["offset"]), size, self._export_stream)
            return {"data": base64.b64encode(piece).decode()}

        return self._wakefulness.awake(export)

    def _forget(self, digest: str) -> bool:
        """Drop an artifact from the cache and from the tiers below; says whether it was there and in nobody's use."""
        return self.store.evict(digest, demote=False) | self._tiers.forget(digest)

    def _cancel(self, digest: str) -> bool:
        """Stop a merge at its next batch; whoever waits for it is told at once."""
        job = self._jobs.get(digest)
        if job is None:
            return False
        job.cancelled.set()
        self._line.remove(job)
        self._finish(job, MergeCancelled(f"the merge of {job.plan.artifact_name} was cancelled"))
        return True

    def _status(self) -> Message:
        merging = [
            {
                "digest": digest,
                "name": job.plan.artifact_name,
                "status": job.status,
                "done": job.done,
                "total": job.total,
            }
            for digest, job in self._jobs.items()
        ]
        slots = {
            slot: digest
            for slot, lora_id in enumerate(compat.slot_ids(self._manager))
            if (digest := self._claims.digest(lora_id)) is not None
        }
        return {
            **self.store.describe(),
            **self._tiers.describe(),
            "slots": slots,
            "slot_count": len(compat.slot_ids(self._manager)),
            "served_from": dict(self._served),
            "pid": os.getpid(),
            "state_number": self._owner.served,
            "api_processes": self._owner.members,
            "merges": self._merges,
            "failures": self._failures,
            "queue": self._line.describe(),
            "pace": self._pace.describe(),
            "merging": merging,
        }

    def _samples(self) -> list[Sample]:
        """What /metrics says of this worker."""
        slots = [self._claims.digest(number) is not None for number in compat.slot_ids(self._manager)]
        facts = {
            "slots_used": sum(slots),
            "slots": len(slots),
            "slot_bytes": self._layout.nbytes if self._layout is not None else 0,
            "source_bytes": self._sources.bytes,
            "source_budget_bytes": self._sources.budget_bytes,
            "merged_elsewhere_total": self._tiers.merged_elsewhere,
            "disk_errors_total": self._tiers.disk_errors,
            "broken_promises_total": self._alarm.count,
            "asleep": self._wakefulness.asleep,
        }
        lookups = {"artifact": self._served, "source": self._sources.lookups}
        cache = {**self.store.describe(), "evicted": self.store.evicted}
        described = described_samples(cache, self._tiers.describe(), self._line.describe(), self._jobs.values())
        return [*self._tally.samples(), *described, *counted_samples(facts, lookups)]

    async def _prepare(self, session: Session, message: Message) -> Message:
        """Make an artifact resident, merging it if need be (once, whoever asks), and lease it to the session if asked.

        A session holds at most one lease on an artifact, so that a call whose caller has left leaks none.
        """
        plan = Plan.from_json(message["plan"])
        digest, wanted_id = plan.digest, int(message["lora_id"])
        # Leased from before the merge, so that nothing can evict it between its arrival and the request's turn.
        self.store.lease(digest)
        try:
            if (owner := self._claims.claim(wanted_id, digest)) is not None:
                raise ControlError("conflict", f"LoRA id {wanted_id} belongs to artifact {owner}")
            if message.get("lease"):
                self._sessions[session].wanted.add(digest)
            artifact = self.store.get(digest)
            tier = "cache"
            if artifact is None:
                artifact = await self._made(plan)
                tier = artifact.origin
        except BaseException:
            self.store.release(digest)
            raise
        self._served[tier] += 1
        held = self._sessions.get(session)  # the session may have ended, or have given up
        if message.get("lease") and held is not None and digest in held.wanted and digest not in held.leases:
            held.leases.add(digest)
        else:
            self.store.release(digest)
        return {
            "rank": artifact.rank,
            "bytes": artifact.nbytes,
            "seconds": artifact.seconds,
            "tensors_sha256": artifact.tensors_sha256,
            "tier": tier,
            "steps": artifact.steps if tier == "merge" else [],
        }

    async def _made(self, plan: Plan) -> ResidentArtifact:
        """From the nearest tier, else merged; once, whoever asks."""
        job = self._jobs.get(plan.digest)
        if job is None or job.cancelled.is_set():
            job = self._jobs[plan.digest] = Job(plan, asyncio.get_running_loop().create_future())
            self._failures.pop(plan.digest, None)
            if self._tiers.any:
                self._cold.put(job)
            else:
                self._enqueue(job)
        job.waiters += 1
        try:
            return await asyncio.shield(job.future)
        except asyncio.CancelledError:
            if job.waiters == 1:  # the last one that waited is gone
                job.cancelled.set()
            raise
        finally:
            job.waiters -= 1

    def _enqueue(self, job: Job) -> None:
        """No tier has it: let it wait for its merge, or refuse."""
        if job.future.done():
            return  # cancelled while its artifact was looked for
        try:
            self._line.put(job)
        except TooManyMerges as error:
            self._finish(job, error)

    def _watch_time(self, job: Job) -> None:
        """Tell who waits as soon as a merge is late, even if it is slow to stop."""
        if not job.future.done():
            loop = asyncio.get_running_loop()
            job.timer = loop.call_later(self._time_limit, lambda: self._finish(job, self._late(job)))

    def _late(self, job: Job) -> MergeError:
        return MergeError(
            f"the merge of {job.plan.artifact_name} took longer than {self._time_limit} s and was stopped "
            "(VLLM_MERGE_TIME_LIMIT)"
        )

    def _finish(self, job: Job, result: ResidentArtifact | Exception) -> None:
        if self._jobs.get(job.plan.digest) is job:
            del self._jobs[job.plan.digest]
        if job.timer is not None:
            job.timer.cancel()
        if job.future.done():
            return
        self._news.ended(job, result)
        if isinstance(result, ResidentArtifact):
            if result.origin == "merge":
                self._tally.ended(job.plan, None)
                self._tally.observe("vllm_merge_merge_seconds", result.seconds)
            job.future.set_result(result)
            return
        self._tally.ended(job.plan, result)
        if isinstance(result, TooManyMerges):
            failure = ControlError("busy", str(result), result.retry_after)
        elif isinstance(result, (OutOfBudget, MergeCancelled, torch.OutOfMemoryError)):
            failure = ControlError("busy", str(result))
        elif isinstance(result, MergeError):
            failure = ControlError("failed", str(result))
        else:
            failure = ControlError("failed", f"{type(result).__name__}: {result}")
        logger.error("merging %s failed: %s", job.plan.artifact_name, failure)
        if failure.kind == "failed":
            self._failures[job.plan.digest] = str(failure)
            while len(self._failures) > FAILURES_KEPT:
                del self._failures[next(iter(self._failures))]
        job.future.set_exception(failure)
        job.future.exception()  # somebody looked, even if every waiter has gone

    def _send_news(self, event: Message) -> None:
        self._post(self._tell, event)

    def _tell(self, event: Message) -> None:
        """`_broadcast` what nobody depends on."""
        for session in self._sessions:
            session.tell(event)

    def _broadcast(self, event: Message) -> None:
        for session in self._sessions:
            session.send(event)

    # -- merging thread -------------------------------------------------------------------------------------------------

    def _merge_forever(self) -> None:
        self._unbind()
        while True:
            job = self._line.get()
            digest = job.plan.digest
            if job.plan.kind == "recipe" and not self._tiers.merge_here(digest):
                self._line.ended(None)
                job.status = "elsewhere"
                self._tiers.await_other(digest, functools.partial(self._cold.put, job))
                continue
            started = time.monotonic()
            job.deadline = started + self._time_limit
            self._news.started(job)
            result: ResidentArtifact | Exception
            try:
                self._server.loop.call_soon_threadsafe(self._watch_time, job)
                result = self._wakefulness.awake(functools.partial(self._merge, job))
            except Exception as error:
                result = self._late(job) if isinstance(error, MergeCancelled) and job.late else error
            merged = isinstance(result, ResidentArtifact)
            self._line.ended(time.monotonic() - started if merged else None)
            self._post(self._finish, job, result)
            if isinstance(result, ResidentArtifact):
                self._after.submit(self._remember, digest, weakref.ref(result))
            else:
                self._tiers.release(digest)
            del job, result  # while it waits, this thread keeps no artifact alive

    def _remember(self, digest: str, reference: weakref.ref[ResidentArtifact]) -> None:
        """What can wait until the artifact is served: its hash, and its way to the disk. One that is gone needs neither."""

        def remember() -> None:
            artifact = reference()
            if artifact is None:
                self._tiers.release(digest)
                return
            if artifact.tensors_sha256 is None:
                timeline = Timeline()
                with timeline.step("hash"):
                    artifact.tensors_sha256 = self._hasher.tensors_sha256(artifact)
                self._tally.stages(timeline.stages())
            self._tiers.store(artifact)

        try:
            self._wakefulness.awake(remember)
        except Exception:
            self._tiers.release(digest)
            logger.exception("an artifact is served, but could not be hashed or kept")

    def _unbind(self) -> None:
        if self._affinity is not None:
            os.sched_setaffinity(0, self._affinity)  # vLLM's CPU worker binds its threads; ours may run anywhere

    def _post(self, function: Callable[..., None], *arguments: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server is going down
            self._server.loop.call_soon_threadsafe(function, *arguments)

    def _merge(self, job: Job) -> ResidentArtifact:
        if job.cancelled.is_set():
            raise MergeCancelled(f"{job.plan.artifact_name}: nobody waits for it any more")
        started, timeline = time.perf_counter(), Timeline()
        timeline.add("queue", job.queued, time.time() - job.queued)

        def progress(stage: str, done: int, total: int) -> None:
            job.done, job.total = done, total
            self._news.progress(job)

        def stopped() -> bool:
            self._arena.rest()
            return job.stopped() or self._wakefulness.asleep

        def going_on() -> None:
            if stopped():
                raise MergeCancelled(f"{job.plan.artifact_name}: nobody waits for it any more")

        with contextlib.ExitStack() as admitted:
            with torch.inference_mode(), self._arena.use():
                admitted.callback(self._sources.done)
                with timeline.step("read"):
                    self._sources.fetch(job.plan, going_on)
                began, merging = time.time(), time.perf_counter()
                merged = run_plan(
                    job.plan,
                    device=self._device,
                    dtype=self._dtype,
                    load_adapter=self._sources.load,
                    progress=progress,
                    cancelled=stopped,
                    workspace_bytes=self._workspace,
                    report="brief",
                )
                timeline.add("merge", began, time.perf_counter() - merging, merged.report.seconds)
                with timeline.step("place"):
                    admitted.enter_context(self.store.admission)
                    artifact = self._resident(job.plan, merged, time.perf_counter() - started)
            artifact.steps = timeline.steps
            if job.plan.stages:
                artifact.report = merged.report.to_dict()
                parameters = sum(a.numel() + b.numel() for a, b in artifact.factors.values())
                self._pace.learn(job.plan, artifact.seconds, parameters)
            self._tally.stages(timeline.stages())
            self.store.insert(artifact)
        self._merges += 1
        logger.info(
            "merged %s: rank %d, %.1f MB, %.3f s", artifact.name, artifact.rank, artifact.nbytes / 1e6, artifact.seconds
        )
        return artifact

    def _resident(self, plan: Plan, merged: MergedAdapter, seconds: float) -> ResidentArtifact:
        pairs = {module: (f.A, f.B) for module, f in merged.factors.items()}
        if not pairs:
            raise MergeError(f"{plan.artifact_name} changes no weight: its adapters are zero, or cancel each other")
        # On a GPU this would take longer than the merge: it follows when the artifact is served.
        tensors_sha256 = merged.tensors_sha256 if self._device.type == "cpu" else None
        embeddings = frozenset(module for module, f in merged.factors.items() if f.embedding)
        return self._placed(plan, pairs, tensors_sha256, seconds, "merge", embeddings)

    def _placed(
        self,
        plan: Plan,
        pairs: Mapping[str, tuple[Tensor, Tensor]],
        tensors_sha256: str | None,
        seconds: float,
        origin: str,
        embeddings: frozenset[str],
    ) -> ResidentArtifact:
        """Factors on any device as an artifact on the worker's, if they fit its slots and the budget."""
        self._arena.rest()
        shapes = tuple((module, a.shape, b.shape) for module, (a, b) in pairs.items())
        if shapes not in self._fitting:
            if reasons := compat.misfits(self._manager, pairs):
                more = f" (and {len(reasons) - 3} more)" if len(reasons) > 3 else ""
                raise MergeError(f"{plan.artifact_name} does not fit this server: " + " ".join(reasons[:3]) + more)
            self._fitting = {shapes, *list(self._fitting)[: SHAPES_KEPT - 1]}
        size = sum(tensor.numel() for pair in pairs.values() for tensor in pair) * self._dtype.itemsize
        self._make_room(plan, size)
        self._arena.rest()
        storage, factors = flat_copy(pairs, self._device, self._dtype)
        self._arena.rest()
        source = None
        if self._layout is not None:
            views = compat.slot_views(self._manager, self._layout.buffers, factors)
            self._arena.rest()
            source = self._layout.source(views) if views is not None else None
            self._arena.rest()
        return ResidentArtifact(
            plan.digest,
            plan.artifact_name,
            storage,
            factors,
            source,
            tensors_sha256,
            seconds,
            origin,
            embeddings=embeddings,
        )

    def _make_room(self, plan: Plan, size: int) -> None:
        """What requests hold, and hold a little longer than they run, is waited for a while. Raises what `store.make_room` does."""
        deadline = time.monotonic() + ROOM_SECONDS
        while True:
            try:
                return self.store.make_room(plan.artifact_name, size)
            except OutOfBudget:
                job = self._jobs.get(plan.digest)
                if job is None or job.stopped() or self._wakefulness.asleep or time.monotonic() > deadline:
                    raise
            time.sleep(ROOM_LOOK_SECONDS)

    # -- the thread of the tiers ------------------------------------------------------------------------------------------

    def _look_forever(self) -> None:
        self._unbind()
        while True:
            job = self._cold.get()
            try:
                result: ResidentArtifact | Exception | None = self._wakefulness.awake(
                    functools.partial(self._returned, job.plan)
                )
            except OutOfBudget as error:
                result = error
            except Exception:
                logger.exception("%s could not come back from the tiers and is merged anew", job.plan.artifact_name)
                result = None
            if result is None:
                self._post(self._enqueue, job)
            else:
                self._post(self._finish, job, result)
            del job, result

    def _returned(self, plan: Plan) -> ResidentArtifact | None:
        """The artifact from the nearest tier, None if none has it."""
        with self._tiers.fetch(plan.digest) as found, contextlib.ExitStack() as admitted:
            if found is None:
                return None
            tier, content = found
            with torch.inference_mode(), self._arena.use():
                admitted.enter_context(self.store.admission)
                pairs, embeddings = content.factors(), content.embeddings
                artifact = self._placed(plan, pairs, content.tensors_sha256, content.seconds, tier, embeddings)
                artifact.report = content.report
            self.store.insert(artifact)
        logger.info("%s came back: %s, %.1f MB", artifact.name, tier, artifact.nbytes / 1e6)
        return artifact
