# SPDX-License-Identifier: Apache-2.0
"""Leases, collisions and broken promises in the API process, against workers that are played."""

import asyncio
import contextlib
import hashlib
from types import SimpleNamespace

import pytest

from vllm_merge.serving import front as front_module
from vllm_merge.serving.control import ControlError
from vllm_merge.serving.front import Artifact, ArtifactUnavailable, FrontDoor
from vllm_merge.serving.identity import lora_id, lora_path

DIGEST = hashlib.sha256(b"x").hexdigest()


class PlayedWorker:
    """Keeps what the front asked for; `hold` delays an answer, `taken` are LoRA ids of other artifacts."""

    def __init__(self, taken=()):
        self.connected = True
        self.taken = set(taken)
        self.leases = 0
        self.prepared = []
        self.hold = asyncio.Event()
        self.hold.set()

    async def call(self, op, **fields):
        assert op == "prepare"
        self.prepared.append(fields["lora_id"])
        await self.hold.wait()
        if fields["lora_id"] in self.taken:
            raise ControlError("conflict", "taken")
        self.leases = 1 if fields["lease"] else self.leases
        return {"rank": 4, "bytes": 8, "seconds": 0.1, "tensors_sha256": "s"}

    def post(self, op, **fields):
        assert op == "release"
        self.leases = 0


@pytest.fixture(autouse=True)
def without_vllm(monkeypatch):
    monkeypatch.setattr(
        front_module.compat,
        "lora_request",
        lambda name, number, path, base=None: SimpleNamespace(lora_name=name, lora_int_id=number, lora_path=path),
    )
    monkeypatch.setattr(front_module, "LINGER_SECONDS", 0.05)


def door(*workers) -> tuple[FrontDoor, Artifact]:
    front = FrontDoor(list(workers))
    plan = SimpleNamespace(digest=DIGEST, artifact_name="x@1", to_json=lambda: "{}")
    front.artifacts[DIGEST] = Artifact(plan)
    return front, front.artifacts[DIGEST]


def test_a_lease_outlives_its_request_a_little_and_no_longer():
    async def scenario():
        worker = PlayedWorker()
        front, artifact = door(worker)
        async with front.lease(artifact.lora_request("x@1")) as holder:
            assert (worker.leases, holder.lora_request.lora_path) == (1, lora_path(DIGEST))
        assert worker.leases == 1
        async with front.lease(artifact.lora_request("x@1")):
            pass
        assert len(worker.prepared) == 1, "the second request found the lease"
        await asyncio.sleep(0.1)
        assert worker.leases == 0

    asyncio.run(scenario())


def test_a_request_that_leaves_while_its_artifact_is_prepared_leaks_no_lease():
    async def scenario():
        worker = PlayedWorker()
        worker.hold.clear()
        front, artifact = door(worker)

        async def request():
            async with front.lease(artifact.lora_request("x@1")):
                raise AssertionError("never ready")

        waiting = asyncio.create_task(request())
        await asyncio.sleep(0.01)
        waiting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await waiting
        worker.hold.set()
        await asyncio.sleep(0.01)
        assert worker.leases == 1, "it came after the request had left"
        await asyncio.sleep(0.1)
        assert worker.leases == 0
        assert not artifact.leased

    asyncio.run(scenario())


def test_an_id_that_one_worker_has_given_away_is_left_by_all():
    async def scenario():
        free, taken = PlayedWorker(), PlayedWorker(taken=[lora_id(DIGEST, 0)])
        front, artifact = door(free, taken)
        async with front.lease(artifact.lora_request("x@1")) as holder:
            assert holder.lora_request.lora_int_id == lora_id(DIGEST, 1)
            assert (free.leases, taken.leases) == (1, 1)

    asyncio.run(scenario())


def test_a_broken_promise_fails_the_request_and_changes_id_and_path():
    async def scenario():
        worker = PlayedWorker()
        front, artifact = door(worker)
        event = {"event": "broken", "digest": DIGEST, "lora_id": lora_id(DIGEST), "reason": "it was gone"}

        async def request():
            async with front.lease(artifact.lora_request("x@1")) as holder:
                holder.check()
                front.on_event(event)
                holder.check()

        with pytest.raises(ArtifactUnavailable, match="gone"):
            await request()
        assert worker.leases == 0
        async with front.lease(artifact.lora_request("x@1")) as holder:
            assert holder.lora_request.lora_path == lora_path(DIGEST, 1)

    asyncio.run(scenario())


def test_a_worker_that_is_gone_is_not_trusted_with_old_leases():
    async def scenario():
        worker = PlayedWorker()
        front, artifact = door(worker)
        async with front.lease(artifact.lora_request("x@1")):
            worker.connected = False

            async def gone(op, **fields):
                raise ControlError("disconnected", "the worker is gone")

            worker.call = gone
            with pytest.raises(ArtifactUnavailable, match="gone") as error:
                async with front.lease(artifact.lora_request("x@1")):
                    pass
            assert error.value.retry

    asyncio.run(scenario())


def test_requests_that_are_not_ours_are_left_alone():
    front, _ = door()
    assert front.lease(None) is None
    assert front.lease(SimpleNamespace(lora_name="sql", lora_path="/adapters/sql")) is None
    with pytest.raises(ArtifactUnavailable):
        front.lease(SimpleNamespace(lora_name="y", lora_path=lora_path("0" * 64)))
