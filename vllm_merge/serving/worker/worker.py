# SPDX-License-Identifier: Apache-2.0
"""A worker's half of the plugin: merges plans in the background and hands vLLM's loader what is ready.

Here it is put together, and here the control line is answered. One thread merges (merging.py), one brings artifacts back from
the tiers below the cache (returning.py), one serves the control socket and keeps the jobs (making.py), and vLLM's own thread
comes by in `load` and `fill` (handing.py). A request whose artifact is not here (its lease was broken) gets an adapter that
changes nothing, and every API process learns of it before the request's next token, so that the request fails.
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
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vllm_merge.adapters.base_model import base_model_hash
from vllm_merge.errors import MergeError
from vllm_merge.recipe.plan import Plan
from vllm_merge.serving import compat
from vllm_merge.serving.control.control import ControlError, ControlServer, Message, Session
from vllm_merge.serving.control.owner import StateOwner
from vllm_merge.serving.identity import FIRST_ID
from vllm_merge.serving.memory.arena import Arena
from vllm_merge.serving.memory.export import MAX_PIECE, Export
from vllm_merge.serving.memory.packed import SideStream
from vllm_merge.serving.memory.residency import ArtifactStore, OutOfBudget, ResidentArtifact
from vllm_merge.serving.memory.slots import SlotLayout, module_shapes
from vllm_merge.serving.memory.sources import SourceCache
from vllm_merge.serving.memory.tiers import Tiers
from vllm_merge.serving.settings import WorkerSettings
from vllm_merge.serving.telemetry.metrics_samples import counted_samples, described_samples
from vllm_merge.serving.telemetry.metrics_tally import Sample, Tally
from vllm_merge.serving.worker.alarm import Alarm, alarm_path
from vllm_merge.serving.worker.claims import Claims
from vllm_merge.serving.worker.handing import Handing
from vllm_merge.serving.worker.jobs import Job, Line
from vllm_merge.serving.worker.making import Making
from vllm_merge.serving.worker.merging import Merging
from vllm_merge.serving.worker.news import News
from vllm_merge.serving.worker.pace import Pace
from vllm_merge.serving.worker.placing import Placing
from vllm_merge.serving.worker.returning import Returning
from vllm_merge.serving.worker.sleep import Wakefulness
from vllm_merge.serving.worker.warm_up import compile_kernels, warm_up

logger = logging.getLogger("vllm_merge.worker")


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
        server = f"{socket.gethostname()}:{socket_path.parent}".replace(" ", "_")
        self._tiers = Tiers(settings, self._device, server)
        self._news = News(self._send_news, {key: compat.place(vllm_config)[key] for key in ("engine", "rank")})
        self.store = ArtifactStore(settings.cache_bytes, self._evicted, lambda: compat.registered_bytes(worker_manager))
        gpu = self._device.type == "cuda"
        total = torch.cuda.get_device_properties(self._device).total_memory if gpu else None
        self._arena = Arena(self._device, settings.cache_bytes + settings.merge_bytes_on(total))
        self._sources = SourceCache(settings.source_bytes, self._device)
        buffers = compat.slot_buffers(worker_manager)
        try:
            compile_kernels(self._device, self._dtype, compat.max_rank(worker_manager))
            with self._arena.use():
                warm_up(self._device, self._dtype, module_shapes(buffers or ()), settings.workspace_bytes_on(total))
        except Exception:  # the model can be served without merges; each of them will say what is wrong
            logger.exception("the merges that warm up the device failed")
        self._arena.take(0)
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
        self._layout = SlotLayout(buffers) if buffers else None
        if self._layout is not None:  # no slot is in use yet; on a GPU this compiles the kernel, outside of any step
            self._layout.fill(0, self._layout.source([None] * len(self._layout.buffers)))
        self._handing = Handing(
            worker_manager,
            self.store,
            self._layout,
            self._claims,
            self._alarm,
            functools.partial(self._post, self._broadcast),
        )
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
            "base_revision": vllm_config.model_config.revision,
            "base_model_hash": base_model_hash(self._base_model),
        }
        self._line = Line(settings.queue)
        cold: queue.SimpleQueue[Job] = queue.SimpleQueue()  # to be looked for in the tiers
        self._making = Making(
            self._line, cold if self._tiers.any else None, settings.time_limit, self._news, self._tally
        )
        self._placing = Placing(worker_manager, self._device, self.store, self._arena, self._layout, self._is_wanted)
        self._merging = Merging(
            self._device,
            self._dtype,
            settings.workspace_bytes_on(total),
            settings.time_limit,
            store=self.store,
            arena=self._arena,
            sources=self._sources,
            tiers=self._tiers,
            line=self._line,
            placing=self._placing,
            wakefulness=self._wakefulness,
            news=self._news,
            tally=self._tally,
            pace=self._pace,
            prepare_thread=self._unbind,
            begun=functools.partial(self._post, self._making.watch_time),
            ended=functools.partial(self._post, self._making.finish),
            look=cold.put,
        )
        self._returning = Returning(
            cold,
            tiers=self._tiers,
            store=self.store,
            arena=self._arena,
            placing=self._placing,
            wakefulness=self._wakefulness,
            prepare_thread=self._unbind,
            ended=functools.partial(self._post, self._making.finish),
            merge=functools.partial(self._post, self._making.enqueue),
            remember=self._merging.remember,
        )
        self._server = ControlServer(socket_path, self)

    def start(self) -> None:
        self._server.start()
        threading.Thread(target=self._merging.run_forever, name="vllm-merge", daemon=True).start()
        if self._tiers.any:
            threading.Thread(target=self._returning.run_forever, name="vllm-merge-tiers", daemon=True).start()
            self._tiers.start()

    def stop(self) -> None:
        for job in list(self._making.jobs.values()):
            job.cancelled.set()
        self._server.stop()

    # -- vLLM's thread --------------------------------------------------------------------------------------------------

    def load(self, lora_request: Any) -> Any | None:
        """As Handing.load."""
        return self._handing.load(lora_request)

    def fill(self, lora_model: Any, slot: int) -> Any | None:
        """As Handing.fill."""
        return self._handing.fill(lora_model, slot)

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

    def _in_use(self, lora_id: int, digest: str) -> bool:
        return self.store.holds(digest) or digest in self._making.jobs or compat.is_registered(self._manager, lora_id)

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
                return {"cancelled": self._making.cancel(message["digest"])}
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
                return {"samples": self._samples(), "failed": list(self._making.failures)}
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

    def _status(self) -> Message:
        merging = [
            {
                "digest": digest,
                "name": job.plan.artifact_name,
                "status": job.status,
                "done": job.done,
                "total": job.total,
            }
            for digest, job in self._making.jobs.items()
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
            "merges": self._merging.merges,
            "failures": self._making.failures,
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
        described = described_samples(cache, self._tiers.describe(), self._line.describe(), self._making.jobs.values())
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
                artifact = await self._making.made(plan)
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

    def _send_news(self, event: Message) -> None:
        self._post(self._tell, event)

    def _tell(self, event: Message) -> None:
        """`_broadcast` what nobody depends on."""
        for session in self._sessions:
            session.tell(event)

    def _broadcast(self, event: Message) -> None:
        for session in self._sessions:
            session.send(event)

    # -- other threads --------------------------------------------------------------------------------------------------

    def _is_wanted(self, digest: str) -> bool:
        job = self._making.jobs.get(digest)
        return job is not None and not job.stopped() and not self._wakefulness.asleep

    def _unbind(self) -> None:
        if self._affinity is not None:
            os.sched_setaffinity(0, self._affinity)  # vLLM's CPU worker binds its threads; ours may run anywhere

    def _post(self, function: Callable[..., None], *arguments: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server is going down
            self._server.loop.call_soon_threadsafe(function, *arguments)
