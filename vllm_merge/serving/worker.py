# SPDX-License-Identifier: Apache-2.0
"""A worker's half of the plugin: merges plans in the background and hands vLLM's loader what is ready.

One thread merges (on the worker's own device, one merge at a time), one serves the control socket, and vLLM's own thread
comes by in `load` and `fill`. For requests of ours these read no file, allocate nothing of an adapter's size and never
raise: one whose artifact is not here (its lease was broken) gets an adapter that changes nothing, and every API process is
told, so that the request fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import queue
import threading
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vllm_merge.adapters.base_model import base_model_hash
from vllm_merge.artifact import MergedAdapter
from vllm_merge.errors import MergeCancelled, MergeError
from vllm_merge.plan_runner import WORKSPACE_BYTES, run_plan
from vllm_merge.recipe.plan import Plan
from vllm_merge.serving import compat
from vllm_merge.serving.arena import Arena
from vllm_merge.serving.control import ControlError, ControlServer, Message, Session
from vllm_merge.serving.identity import FIRST_ID, parse_path
from vllm_merge.serving.residency import ArtifactStore, OutOfBudget, ResidentArtifact
from vllm_merge.serving.slots import SlotLayout, flat_copy

logger = logging.getLogger("vllm_merge.worker")

CACHE_BYTES_VARIABLE = "VLLM_MERGE_CACHE_BYTES"
DEFAULT_CACHE_BYTES = 4 << 30
BROKEN = "broken"  # who owns a LoRA id under which vLLM once loaded something wrong
GPU_WORKSPACE_BYTES = 512 << 20  # small pieces: a merge beside running requests must let them have the GPU in between


@dataclass
class Job:
    """One merge, wanted by any number of requests."""

    plan: Plan
    future: asyncio.Future[ResidentArtifact]
    status: str = "queued"  # queued | merging
    done: int = 0
    total: int = 0
    cancelled: threading.Event = field(default_factory=threading.Event)
    waiters: int = 0


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
        parallel = vllm_config.parallel_config
        self._workers = int(parallel.world_size) * int(parallel.data_parallel_size)
        cache_bytes = int(os.environ.get(CACHE_BYTES_VARIABLE, DEFAULT_CACHE_BYTES))
        self.store = ArtifactStore(cache_bytes)
        # On the CPU the same pieces as offline: what is summed in another order differs in its last bits.
        self._workspace = GPU_WORKSPACE_BYTES if self._device.type == "cuda" else WORKSPACE_BYTES
        self._arena = Arena(self._device, cache_bytes + 2 * GPU_WORKSPACE_BYTES)
        self._jobs: dict[str, Job] = {}
        self._claims: dict[int, str] = {}  # LoRA id -> digest, or BROKEN
        self._sessions: dict[Session, set[str]] = {}  # the digests that each leases
        self._zero = compat.zero_lora_model(worker_manager, 1)
        buffers = compat.slot_buffers(worker_manager)
        self._layout = SlotLayout(buffers) if buffers else None
        if self._layout is not None:  # no slot is in use yet; on a GPU this compiles the kernel, outside of any step
            self._layout.fill(0, self._layout.source([None] * len(self._layout.buffers)))
        self._affinity = affinity
        self._hello: Message = {
            "pid": os.getpid(),
            "workers": self._workers,
            "max_lora_rank": compat.max_rank(worker_manager),
            "dtype": str(self._dtype).removeprefix("torch."),
            "device": str(self._device),
            "base_model": self._base_model,
            "base_model_hash": base_model_hash(self._base_model),
        }
        self._queue: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._server = ControlServer(socket_path, self)

    def start(self) -> None:
        self._server.start()
        threading.Thread(target=self._merge_forever, name="vllm-merge", daemon=True).start()

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
            if artifact is not None and artifact.source is not None:
                model = compat.marker_lora_model(self._manager, lora_request.lora_int_id)
                model.vllm_merge_service, model.vllm_merge_digest = self, digest
                return model
            if artifact is not None:
                model = compat.lora_model(self._manager, lora_request.lora_int_id, artifact.factors)
                model.vllm_merge_artifact = artifact  # counted for as long as vLLM keeps the model
                return model
            reason = f"{lora_request.lora_name} was not in memory when a request needed it"
        except Exception as error:
            logger.exception("could not hand %s to vLLM", lora_request.lora_name)
            reason = f"{lora_request.lora_name} could not be handed to vLLM: {error}"
        self._say_broken(digest, lora_request.lora_int_id, reason)
        return self._zero.clone(lora_request.lora_int_id)

    def fill(self, lora_model: Any, slot: int) -> bool:
        """Fill a slot with the artifact that a LoRAModel stands for. Never raises."""
        digest = lora_model.vllm_merge_digest
        assert self._layout is not None
        try:
            artifact = self.store.peek(digest)
            if artifact is not None and artifact.source is not None:
                if artifact.storage.is_cuda:  # its memory may be given back before this stream has read it
                    stream = torch.cuda.current_stream(artifact.storage.device)
                    for storage in artifact.storages:
                        storage.record_stream(stream)
                self._layout.fill(slot, artifact.source)
                return True
            reason = "it was not in memory when its slot was filled"
        except Exception as error:
            logger.exception("could not fill slot %d", slot)
            reason = f"its slot could not be filled: {error}"
        self._say_broken(digest, lora_model.id, reason)
        return False  # vLLM copies the marker, which changes nothing

    def _say_broken(self, digest: str, lora_id: int, reason: str) -> None:
        """The id is used up: whoever asks next gets another one, and requests that run under it fail."""
        logger.error("artifact %s: %s; its requests fail", digest[:12], reason)

        def say() -> None:
            self._claims[lora_id] = BROKEN
            self._broadcast({"event": "broken", "digest": digest, "lora_id": lora_id, "reason": reason})

        with contextlib.suppress(RuntimeError):  # the loop is closed: the server is going down
            self._server.loop.call_soon_threadsafe(say)

    # -- control thread -------------------------------------------------------------------------------------------------

    async def handle(self, session: Session, op: str, message: Message) -> Message:
        self._sessions.setdefault(session, set())
        match op:
            case "hello":
                return self._hello
            case "prepare":
                return await self._prepare(session, message)
            case "release":
                if message["digest"] in self._sessions[session]:
                    self._sessions[session].discard(message["digest"])
                    self.store.release(message["digest"])
                return {}
            case "evict":
                return {"evicted": self.store.evict(message["digest"])}
            case "status":
                return self._status()
        raise ControlError("failed", f"unknown operation {op!r}")

    def closed(self, session: Session) -> None:
        for digest in self._sessions.pop(session, set()):
            self.store.release(digest)

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
        return {**self.store.describe(), "pid": os.getpid(), "merging": merging}

    async def _prepare(self, session: Session, message: Message) -> Message:
        """Make an artifact resident, merging it if need be (once, whoever asks), and lease it to the session if asked.

        A session holds at most one lease on an artifact, so that a call whose caller has left leaks none.
        """
        plan = Plan.from_json(message["plan"])
        digest, wanted_id = plan.digest, int(message["lora_id"])
        if (owner := self._claims.setdefault(wanted_id, digest)) != digest:
            raise ControlError("conflict", f"LoRA id {wanted_id} belongs to artifact {owner[:12]}")
        # Leased from before the merge, so that nothing can evict it between its arrival and the request's turn.
        self.store.lease(digest)
        try:
            artifact = self.store.get(digest) or await self._merged(plan)
        except BaseException:
            self.store.release(digest)
            raise
        leases = self._sessions.get(session)
        if message.get("lease") and leases is not None and digest not in leases:
            leases.add(digest)
        else:
            self.store.release(digest)
        return {
            "rank": artifact.rank,
            "bytes": artifact.nbytes,
            "seconds": artifact.seconds,
            "tensors_sha256": artifact.tensors_sha256,
        }

    async def _merged(self, plan: Plan) -> ResidentArtifact:
        job = self._jobs.get(plan.digest)
        if job is None or job.cancelled.is_set():
            job = self._jobs[plan.digest] = Job(plan, asyncio.get_running_loop().create_future())
            self._queue.put(job)
        job.waiters += 1
        try:
            return await asyncio.shield(job.future)
        except asyncio.CancelledError:
            if job.waiters == 1:  # the last one that waited is gone
                job.cancelled.set()
            raise
        finally:
            job.waiters -= 1

    def _finish(self, job: Job, result: ResidentArtifact | Exception) -> None:
        if self._jobs.get(job.plan.digest) is job:
            del self._jobs[job.plan.digest]
        if job.future.done():
            return
        if isinstance(result, ResidentArtifact):
            job.future.set_result(result)
            return
        if isinstance(result, (OutOfBudget, MergeCancelled, torch.OutOfMemoryError)):
            failure = ControlError("busy", str(result))
        elif isinstance(result, MergeError):
            failure = ControlError("failed", str(result))
        else:
            failure = ControlError("failed", f"{type(result).__name__}: {result}")
        logger.error("merging %s failed: %s", job.plan.artifact_name, failure)
        job.future.set_exception(failure)
        job.future.exception()  # somebody looked, even if every waiter has gone

    def _broadcast(self, event: Message) -> None:
        for session in self._sessions:
            session.send(event)

    # -- merging thread -------------------------------------------------------------------------------------------------

    def _merge_forever(self) -> None:
        if self._affinity is not None:
            os.sched_setaffinity(0, self._affinity)  # vLLM's CPU worker binds its threads; ours may run anywhere
        while True:
            job = self._queue.get()
            result: ResidentArtifact | Exception
            try:
                result = self._merge(job)
            except Exception as error:
                result = error
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server is going down
                self._server.loop.call_soon_threadsafe(self._finish, job, result)
            del job, result  # while it waits, this thread keeps no artifact alive

    def _merge(self, job: Job) -> ResidentArtifact:
        if job.cancelled.is_set():
            raise MergeCancelled(f"{job.plan.artifact_name}: nobody waits for it any more")
        job.status = "merging"
        started = time.perf_counter()

        def progress(stage: str, done: int, total: int) -> None:
            job.done, job.total = done, total

        with torch.inference_mode(), self._arena.use():
            merged = run_plan(
                job.plan,
                device=self._device,
                dtype=self._dtype,
                progress=progress,
                cancelled=job.cancelled.is_set,
                workspace_bytes=self._workspace,
            )
            artifact = self._resident(job.plan, merged, time.perf_counter() - started)
        self.store.insert(artifact)
        logger.info(
            "merged %s: rank %d, %.1f MB, %.3f s", artifact.name, artifact.rank, artifact.nbytes / 1e6, artifact.seconds
        )
        return artifact

    def _resident(self, plan: Plan, merged: MergedAdapter, seconds: float) -> ResidentArtifact:
        pairs = {module: (f.A, f.B) for module, f in merged.factors.items()}
        if not pairs:
            raise MergeError(f"{plan.artifact_name} changes no weight: its adapters are zero, or cancel each other")
        if reasons := compat.misfits(self._manager, pairs):
            more = f" (and {len(reasons) - 3} more)" if len(reasons) > 3 else ""
            raise MergeError(f"{plan.artifact_name} does not fit this server: " + " ".join(reasons[:3]) + more)
        size = sum(tensor.numel() for pair in pairs.values() for tensor in pair) * self._dtype.itemsize
        self.store.make_room(plan.artifact_name, size)
        storage, factors = flat_copy(pairs, self._device, self._dtype)
        source = None
        if self._layout is not None:
            views = compat.slot_views(self._manager, self._layout.buffers, factors)
            source = self._layout.source(views) if views is not None else None
        return ResidentArtifact(
            plan.digest,
            plan.artifact_name,
            storage,
            factors,
            source,
            merged.tensors_sha256,
            seconds,
        )
