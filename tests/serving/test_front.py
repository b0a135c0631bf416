# SPDX-License-Identifier: Apache-2.0
"""Leases, collisions and broken promises in the API process, against workers that are played."""

import asyncio
import contextlib
import hashlib
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.conftest import ROOT
from tests.serving.facts import FACTS
from vllm_merge.adapters.catalogue import Catalogue
from vllm_merge.errors import MergeError
from vllm_merge.serving.control import front as front_module
from vllm_merge.serving.control import links as links_module
from vllm_merge.serving.control.control import ControlError
from vllm_merge.serving.control.front import Artifact, ArtifactUnavailable, FrontDoor
from vllm_merge.serving.control.names import Name, resolve_names
from vllm_merge.serving.identity import lora_id, lora_path

DIGEST = hashlib.sha256(b"x").hexdigest()


class PlayedWorker:
    """Keeps what the front asked for; `hold` delays an answer, `taken` are LoRA ids of other artifacts."""

    def __init__(self, taken=()):
        self.connected = True
        self.facts = {}
        self.alarms = 0
        self.broken = None
        self.near = False
        self.fails = None
        self.released = 0
        self.taken = set(taken)
        self.leases = 0
        self.prepared = []
        self.hold = asyncio.Event()
        self.hold.set()

    async def call(self, op, **fields):
        if op == "broken":
            return {"reason": self.broken}
        if op == "near":
            return {"near": self.near, "retry_after": 7}
        assert op == "prepare"
        self.prepared.append(fields["lora_id"])
        await self.hold.wait()
        if fields["lora_id"] in self.taken:
            raise ControlError("conflict", "taken")
        if self.fails is not None:
            raise self.fails
        self.leases = 1 if fields["lease"] else self.leases
        return {"rank": 4, "bytes": 8, "seconds": 0.1, "tensors_sha256": "s", "tier": "merge", "steps": []}

    def post(self, op, **fields):
        assert op == "release"
        self.leases = 0
        self.released += 1


@pytest.fixture(autouse=True)
def without_vllm(monkeypatch):
    monkeypatch.setattr(
        front_module.compat,
        "lora_request",
        lambda name, number, path, base=None: SimpleNamespace(lora_name=name, lora_int_id=number, lora_path=path),
    )
    monkeypatch.setattr(front_module, "LINGER_SECONDS", 0.05)


async def until(condition) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.001)


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
        await until(lambda: worker.leases == 0)

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
        await until(lambda: bool(worker.prepared))
        waiting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await waiting
        assert worker.leases == 0
        worker.hold.set()
        await until(lambda: worker.released == 1)  # of the lease that came after the request had left
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
                await holder.check()
                front.on_event(event)
                await holder.check()

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


def test_an_alarm_that_no_message_told_of_yet_stops_the_very_output_it_is_about():
    async def scenario():
        worker = PlayedWorker()
        front, artifact = door(worker)

        async def request():
            async with front.lease(artifact.lora_request("x@1")) as holder:
                worker.alarms, worker.broken = 1, "it was gone"
                await holder.check()
                raise AssertionError("the output was passed on")

        with pytest.raises(ArtifactUnavailable, match="gone") as error:
            await request()
        assert error.value.retry
        assert worker.leases == 0
        async with front.lease(artifact.lora_request("x@1")) as holder:
            assert holder.lora_request.lora_path == lora_path(DIGEST, 1)

    asyncio.run(scenario())


def test_an_alarm_for_another_artifact_costs_one_question():
    async def scenario():
        worker = PlayedWorker()
        front, artifact = door(worker)
        asked = []
        call = worker.call

        async def counted(op, **fields):
            asked.append(op)
            return await call(op, **fields)

        worker.call = counted
        async with front.lease(artifact.lora_request("x@1")) as holder:
            for _ in range(3):
                await holder.check()
            worker.alarms = 1
            for _ in range(3):
                await holder.check()
        assert asked == ["prepare", "broken"]

    asyncio.run(scenario())


def test_a_lost_worker_is_reached_again_and_its_leases_are_taken_again(monkeypatch):
    async def scenario():
        monkeypatch.setattr(links_module, "RECONNECT_SECONDS", 0.01)
        worker = PlayedWorker()
        worker.path = Path("worker-1.sock")
        front, artifact = door(worker)
        attempts = []

        async def connect():
            attempts.append(1)
            if len(attempts) < 3:
                raise ConnectionRefusedError
            worker.connected = True

        worker.connect = connect
        async with front.lease(artifact.lora_request("x@1")):
            worker.connected, worker.leases = False, 0
            worker.on_lost()
            await until(lambda: worker.leases == 1 and artifact.leased)  # the request that runs has its lease again
            assert len(attempts) == 3
        prepared = len(worker.prepared)
        worker.on_lost()  # lost and made again before anybody looked: the old lease counts no more
        async with front.lease(artifact.lora_request("x@1")):
            assert len(worker.prepared) == prepared + 1

    asyncio.run(scenario())


def test_a_request_that_does_not_wait_is_told_when_to_come_back_while_the_merge_goes_on():
    async def scenario():
        worker = PlayedWorker()
        front, artifact = door(worker)
        worker.hold.clear()
        for _ in range(3):
            with pytest.raises(ArtifactUnavailable, match="is being merged") as error:
                async with front.hold(artifact, "x@1", wait=False):
                    pass
            assert (error.value.retry, error.value.retry_after) == (True, 7)
            await until(lambda: bool(worker.prepared))
        assert len(worker.prepared) == 1, "one merge in the background"
        worker.hold.set()
        worker.near = True
        await until(lambda: artifact.state == "ready")
        async with front.hold(artifact, "x@1", wait=False):
            assert worker.leases == 1

    asyncio.run(scenario())


def test_a_failure_that_stays_is_said_at_once_even_to_those_who_do_not_wait():
    async def scenario():
        worker = PlayedWorker()
        front, artifact = door(worker)
        worker.fails = ControlError("failed", "an adapter is gone")
        for wait in (True, False):
            with pytest.raises(ArtifactUnavailable, match="an adapter is gone") as error:
                async with front.hold(artifact, "x@1", wait=wait):
                    pass
            assert not error.value.retry

    asyncio.run(scenario())


def test_who_waited_for_a_merge_that_failed_is_told_and_does_not_try_it_again():
    async def scenario():
        worker = PlayedWorker()
        front, artifact = door(worker)
        worker.hold.clear()
        worker.fails = ControlError("busy", "the merge was cancelled", 3)
        waiting = [asyncio.create_task(front.ready(artifact)) for _ in range(40)]
        await until(lambda: bool(worker.prepared))
        worker.hold.set()
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert {(str(r), r.retry, r.retry_after) for r in results} == {("x@1: the merge was cancelled", True, 3)}
        assert len(worker.prepared) == 1
        worker.fails = None
        await front.ready(artifact)
        assert len(worker.prepared) == 2, "whoever comes later tries again"

    asyncio.run(scenario())


def test_the_queues_time_reaches_the_request():
    async def scenario():
        worker = PlayedWorker()
        front, artifact = door(worker)
        worker.fails = ControlError("busy", "16 merges are waiting already", 40)
        with pytest.raises(ArtifactUnavailable, match="waiting already") as error:
            await front.ready(artifact)
        assert (error.value.retry, error.value.retry_after) == (True, 40)

    asyncio.run(scenario())


def test_no_request_waits_longer_than_it_may_not_even_for_another_that_waits(monkeypatch):
    async def scenario():
        monkeypatch.setattr(front_module, "PREPARE_SECONDS", 0.1)
        worker = PlayedWorker()
        front, artifact = door(worker)
        worker.hold.clear()
        started = asyncio.get_running_loop().time()

        async def request():
            async with front.lease(artifact.lora_request("x@1")):
                raise AssertionError("never ready")

        results = await asyncio.gather(*(request() for _ in range(5)), return_exceptions=True)
        assert all(isinstance(result, ArtifactUnavailable) and result.retry for result in results)
        assert "not ready within" in str(results[-1])
        assert asyncio.get_running_loop().time() - started < 1
        assert worker.released >= 1, "what comes too late is not wanted any more"

    asyncio.run(scenario())


@pytest.mark.parametrize("on_error", ["stop", "degraded"])
@pytest.mark.parametrize("when", ["planning", "merging"])
def test_an_eager_recipe_that_fails_stops_the_start_or_only_itself(on_error, when):
    async def scenario():
        worker = PlayedWorker()
        front, artifact = door(worker)
        worker.fails = ControlError("failed", "its adapters cancel each other") if when == "merging" else None
        bad = (
            Name("bad", "recipe", DIGEST, "bad@1")
            if when == "merging"
            else Name("bad", "recipe", None, reason="no file")
        )
        recipe = SimpleNamespace(load="eager", on_error=on_error)
        lazy = SimpleNamespace(load="lazy", on_error="degraded")
        recipes = SimpleNamespace(path=Path("r.yaml"), recipes={"lazy": lazy, "bad": recipe})
        resolved = SimpleNamespace(recipes=recipes, names={"bad": bad}, plans={DIGEST: artifact.plan})
        if on_error == "degraded":
            await front.warm_eager(resolved)
            return
        with pytest.raises(MergeError, match=r"r.yaml: recipes.bad: on_error: stop: .*(no file|cancel each other)"):
            await front.warm_eager(resolved)

    asyncio.run(scenario())


def test_what_a_file_says_of_misses_reaches_its_names():
    names = resolve_names(ROOT / "configs" / "on_miss.yaml", FACTS, Catalogue(), {}).names
    said = {name: (names[name].on_miss, names[name].fallback) for name in ("first", "second", "third", "assistant")}
    assert said == {
        "first": ("wait", None),
        "second": ("fallback", "first"),
        "third": ("reject", None),
        "assistant": ("fallback", "first"),
    }
