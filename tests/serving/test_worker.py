# SPDX-License-Identifier: Apache-2.0
"""A worker's service without vLLM: merges that are played, the real control line, cache and tiers."""

import asyncio
import json
import sys
import tempfile
import threading
import time
import weakref
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import ANY

import pytest
import torch

from vllm_merge.adapters.factors import LoraFactors
from vllm_merge.artifact import MergedAdapter, MergeReport
from vllm_merge.errors import MergeCancelled, MergeError
from vllm_merge.serving.control.control import ControlError, WorkerLink
from vllm_merge.serving.identity import lora_id, lora_path
from vllm_merge.serving.memory.arena import quick_switches
from vllm_merge.serving.worker import handing, merging, placing
from vllm_merge.serving.worker import worker as worker_module
from vllm_merge.serving.worker.claims import Claims
from vllm_merge.serving.worker.jobs import Job, Line, TooManyMerges
from vllm_merge.serving.worker.worker import WorkerService

SIZE = 2 * 4 * 64 * 4  # bytes of one artifact below


class Merges:
    """Stands for run_plan: each merge takes a step at a time, until it is let go or stopped."""

    def __init__(self):
        self.started: list[str] = []
        self.ended: list[str] = []
        self.go = threading.Event()
        self.go.set()
        self.deaf = False

    def __call__(self, plan, *, cancelled, **options):
        self.started.append(plan.name)
        while not self.go.wait(0.005):
            if cancelled() and not self.deaf:
                self.ended.append(f"{plan.name} stopped")
                raise MergeCancelled("stopped at a batch")
        if plan.name == "wrong":
            raise MergeError("it cannot be merged")
        self.ended.append(plan.name)
        value = float(sum(plan.name.encode()))
        factors = {"m": LoraFactors(torch.full((4, 64), value), torch.full((64, 4), value))}
        return MergedAdapter(plan.name, factors, MergeReport("none", "factors"), {})


def digest(name: str) -> str:
    return name.encode().hex().ljust(64, "0")


class PlayedVllm:
    """What the service asks of vLLM: `registered` are the adapters that it keeps."""

    def __init__(self):
        self.registered = {}

    def __getattr__(self, name):
        return {
            "slot_dtype": lambda manager: torch.float32,
            "max_rank": lambda manager: 64,
            "zero_lora_model": lambda manager, number: SimpleNamespace(
                clone=lambda n: SimpleNamespace(id=n, zero=True)
            ),
            "marker_lora_model": lambda manager, number: SimpleNamespace(id=number),
            "slot_buffers": lambda manager: None,
            "misfits": lambda manager, pairs: [],
            "registered_bytes": lambda manager: 0,
            "is_registered": lambda manager, number: number in self.registered,
            "slot_ids": lambda manager: [],
            "mend_prompt_logprobs": lambda: None,
            "mend_rows_without_lora": lambda: False,
            "place": lambda config: {"engine": 0, "rank": 0, "workers": 1},
            "packed_lora_model": lambda manager, number, factors: SimpleNamespace(id=number, factors=factors),
        }[name]


@pytest.fixture
def merges(monkeypatch):
    played = Merges()
    monkeypatch.setattr(merging, "run_plan", played)
    vllm = PlayedVllm()
    for module in (worker_module, placing, handing):
        monkeypatch.setattr(module, "compat", vllm)
    monkeypatch.setattr(worker_module, "base_model_hash", lambda model: "base")

    def plan(text):
        kind = "adapter" if text.startswith("plain") else "recipe"
        return SimpleNamespace(
            name=text,
            digest=digest(text),
            artifact_name=f"{text}@{digest(text)[:12]}",
            adapters={},
            stages=[],
            kind=kind,
        )

    monkeypatch.setattr(worker_module, "Plan", SimpleNamespace(from_json=plan))
    yield played
    played.go.set()


@pytest.fixture
def serve(merges, monkeypatch):
    """serve(cache_bytes=…, queue=…, …) starts a service with these settings."""
    services = []

    def start(**changes) -> WorkerService:
        for name, value in changes.items():
            monkeypatch.setenv(f"VLLM_MERGE_{name.upper()}", str(value))
        parallel = SimpleNamespace(world_size=1, data_parallel_size=1)
        config = SimpleNamespace(model_config=SimpleNamespace(model="base", revision=None), parallel_config=parallel)
        path = Path(tempfile.mkdtemp(prefix="vm-")) / "worker-1.sock"  # a socket's path must be short
        service = WorkerService(SimpleNamespace(device="cpu"), config, path, None)
        service.start()
        services.append(service)
        return service

    yield start
    for service in services:
        service.stop()


def talk(service: WorkerService, scenario) -> None:
    async def run():
        link = WorkerLink(service._server.path, lambda event: None)
        await link.connect()
        try:
            await asyncio.wait_for(scenario(link), 240)
        finally:
            await link.close()

    asyncio.run(run())


def prepare(link: WorkerLink, name: str, lease: bool = False):
    return link.call("prepare", plan=name, lora_id=lora_id(digest(name)), lease=lease)


async def until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


async def written(service: WorkerService, folder: Path, *names: str) -> None:
    """Until the disk has these, and nothing that is being written to it answers from host memory any more."""
    await until(lambda: all((folder / digest(name) / "used").exists() for name in names))
    await asyncio.to_thread(service._tiers.wait)


# -- tiers --------------------------------------------------------------------------------------------------------------


def test_an_artifact_that_left_the_cache_comes_back_without_a_merge(serve, merges, tmp_path):
    service = serve(cache_bytes=SIZE, host_bytes=SIZE, disk=tmp_path)

    async def scenario(link):
        first = await prepare(link, "a")
        assert first["tier"] == "merge"
        assert (await prepare(link, "a"))["tier"] == "cache"
        await prepare(link, "b")  # a goes to host memory
        again = await prepare(link, "a")
        assert again == {**first, "tier": "host", "steps": []}
        await written(service, tmp_path, "a", "b")
        assert (await prepare(link, "b"))["tier"] == "disk", "host memory was taken by a, which was coming back"
        await prepare(link, "c")
        await written(service, tmp_path, "c")
        assert [(await prepare(link, name))["tier"] for name in "ba"] == ["host", "disk"]
        assert merges.started == ["a", "b", "c"]
        status = await link.call("status")
        (row,) = status["artifacts"]
        assert (row["name"], row["tier"], row["origin"]) == (f"a@{digest('a')[:12]}", "cache", "disk")
        assert status["bytes"] == status["budget_bytes"] == status["host"]["bytes"] == SIZE
        assert status["disk"]["bytes"] > 3 * SIZE
        assert status["served_from"] == {"merge": 3, "cache": 1, "host": 2, "disk": 2}

    talk(service, scenario)


def test_a_damaged_disk_entry_is_merged_anew(serve, merges, tmp_path):
    service = serve(cache_bytes=SIZE, disk=tmp_path)

    async def scenario(link):
        first = await prepare(link, "a")
        await prepare(link, "b")
        await written(service, tmp_path, "a")
        weights = tmp_path / digest("a") / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1] + b"x")
        again = {**first, "tier": "merge", "seconds": pytest.approx(0, abs=5), "steps": ANY}
        assert await prepare(link, "a") == again
        assert merges.started == ["a", "b", "a"]

    talk(service, scenario)


def test_many_that_come_back_at_once_come_back_once(serve, merges, tmp_path):
    service = serve(cache_bytes=2 * SIZE, host_bytes=4 * SIZE)

    async def scenario(link):
        for name in "abcd":
            await prepare(link, name)
        replies = await asyncio.gather(*(prepare(link, name) for name in "ab" * 10))
        assert {reply["tier"] for reply in replies} <= {"host", "cache"}
        assert len(merges.started) == 4
        assert service.store.describe()["bytes"] <= 2 * SIZE

    talk(service, scenario)


def test_a_full_cache_of_leases_is_said_and_nothing_is_lost(serve, merges, monkeypatch):
    monkeypatch.setattr(placing, "ROOM_SECONDS", 0.1)
    service = serve(cache_bytes=SIZE, host_bytes=4 * SIZE)

    async def scenario(link):
        await prepare(link, "a")
        await prepare(link, "b", lease=True)
        for name in "ac":
            with pytest.raises(ControlError, match="running requests") as error:
                await prepare(link, name)
            assert error.value.kind == "busy"
        await link.call("release", digest=digest("b"))
        assert (await prepare(link, "a"))["tier"] == "host"

    talk(service, scenario)


def test_what_finds_no_room_waits_until_a_request_has_ended(serve, merges):
    service = serve(cache_bytes=SIZE)

    async def scenario(link):
        await prepare(link, "a", lease=True)
        waiting = asyncio.create_task(prepare(link, "b"))
        await until(lambda: merges.ended == ["a", "b"])
        assert not waiting.done()
        await link.call("release", digest=digest("a"))
        assert (await waiting)["tier"] == "merge"

    talk(service, scenario)


# -- queue, cancel, time ------------------------------------------------------------------------------------------------


def test_beyond_the_queue_merges_are_refused_with_a_time(serve, merges):
    service = serve(queue=2)
    merges.go.clear()

    async def scenario(link):
        waiting = [asyncio.create_task(prepare(link, "a"))]
        await until(lambda: merges.started == ["a"])
        waiting += [asyncio.create_task(prepare(link, name)) for name in "bc"]
        await until(lambda: service._line.describe()["waiting"] == 2)
        with pytest.raises(ControlError, match=r"2 merges are waiting already \(VLLM_MERGE_QUEUE\)") as full:
            await prepare(link, "d")
        assert full.value.kind == "busy"
        assert full.value.retry_after == 15, "three merges of five seconds, as nobody has timed one yet"
        waiting.append(asyncio.create_task(prepare(link, "plain")))  # nor does what is only read
        joining = asyncio.create_task(prepare(link, "b"))  # who wants what waits already takes no place
        await asyncio.sleep(0.05)
        merges.go.set()
        await asyncio.gather(*waiting, joining)
        assert merges.ended == ["a", "b", "c", "plain"]
        assert (await prepare(link, "d"))["tier"] == "merge"

    talk(service, scenario)


def test_a_cancelled_merge_frees_the_worker_and_tells_who_waits(serve, merges):
    service = serve()
    merges.go.clear()

    async def scenario(link):
        running, waiting = (asyncio.create_task(prepare(link, name)) for name in "ab")
        await until(lambda: merges.started == ["a"] and len(service._making.jobs) == 2)
        for name, task in (("b", waiting), ("a", running)):
            assert (await link.call("cancel", digest=digest(name)))["cancelled"]
            with pytest.raises(ControlError, match="was cancelled") as error:
                await task
            assert error.value.kind == "busy"
        await until(lambda: merges.ended == ["a stopped"])
        merges.go.set()
        assert (await prepare(link, "c"))["tier"] == "merge"
        assert merges.started == ["a", "c"], "b never began"
        assert not (await link.call("cancel", digest=digest("c")))["cancelled"]
        assert (await prepare(link, "a"))["tier"] == "merge", "it may be asked for again"

    talk(service, scenario)


@pytest.mark.parametrize("deaf", [False, True])
def test_a_merge_that_takes_too_long_is_stopped(serve, merges, deaf):
    service = serve(time_limit=1)
    merges.go.clear()
    merges.deaf = deaf

    async def scenario(link):
        with pytest.raises(ControlError, match=r"longer than 1 s .*VLLM_MERGE_TIME_LIMIT") as error:
            await prepare(link, "a")
        assert error.value.kind == "failed"
        assert not merges.go.is_set(), "who waits is told even if the merge does not listen"
        if deaf:
            assert merges.ended == []
        else:
            await until(lambda: merges.ended == ["a stopped"])
        merges.go.set()
        assert (await prepare(link, "b"))["tier"] == "merge"

    talk(service, scenario)


def test_a_finished_job_keeps_no_artifact_alive(serve, merges):
    service = serve(cache_bytes=SIZE)

    async def scenario(link):
        for name in "abcdef":
            await prepare(link, name)
            assert service.store.describe()["bytes"] == SIZE

    talk(service, scenario)


def test_what_follows_a_merge_does_not_keep_the_process_from_ending(serve, merges):
    """It waits where vLLM sleeps, and a server that sleeps may be stopped."""
    service = serve()
    assert service._merging.after.submit(threading.current_thread).result(30).daemon


@pytest.fixture
def hashes(monkeypatch) -> dict[str, str]:
    """As on a GPU, the hash comes after the merge. By digest, what it will be."""
    whole, told = merging.Merging._resident, {}

    def unhashed(*arguments):
        made = whole(*arguments)
        told[made.digest], made.tensors_sha256 = made.tensors_sha256, None
        return made

    monkeypatch.setattr(merging.Merging, "_resident", unhashed)
    return told


def test_what_leaves_the_cache_before_it_is_hashed_is_hashed_when_it_is_back(serve, merges, hashes, tmp_path):
    """Only what has a hash may go to the disk."""
    service = serve(cache_bytes=SIZE, host_bytes=4 * SIZE, disk=tmp_path)
    go = threading.Event()
    service._merging.after.submit(lambda: go.wait(60))

    async def scenario(link):
        await prepare(link, "a")
        await prepare(link, "b")  # a leaves
        go.set()
        await asyncio.to_thread(service._merging.after.submit(lambda: None).result, 60)
        assert (await prepare(link, "a"))["tier"] == "host"
        await written(service, tmp_path, "a")
        stored = json.loads((tmp_path / digest("a") / "artifact.json").read_text())
        assert stored["tensors_sha256"] == hashes[digest("a")]
        await prepare(link, "b")  # a leaves again, with its hash
        with service._tiers.fetch(digest("a")) as (tier, packed):
            assert (tier, packed.tensors_sha256) == ("host", hashes[digest("a")])

    talk(service, scenario)


@pytest.mark.usefixtures("hashes")
def test_the_latest_artifact_is_hashed_first(serve, merges, monkeypatch):
    """A merge that needs the room of the oldest would wait until it is hashed."""
    hashed: list[str] = []
    service = serve(cache_bytes=3 * SIZE)
    monkeypatch.setattr(
        service._merging._hasher, "tensors_sha256", lambda artifact: hashed.append(artifact.name[0]) or "hash"
    )
    go = threading.Event()
    service._merging.after.submit(lambda: go.wait(60))

    async def scenario(link):
        for name in "abcde":  # there is room for three
            await prepare(link, name)
        go.set()
        await asyncio.to_thread(service._merging.after.submit(lambda: None).result, 60)

    talk(service, scenario)
    assert hashed == ["e", "d", "c"]


@pytest.mark.parametrize("short_of_memory", [1, 2])
def test_a_merge_that_finds_no_memory_begins_anew_once(serve, merges, monkeypatch, short_of_memory):
    """What the first attempt held is free by then, and so is what the allocator kept."""
    service = serve()
    held: list[weakref.ref] = []
    given_back: list[bool] = []

    def starved(plan, **options):
        if len(held) < short_of_memory:
            stack = torch.ones(1)
            held.append(weakref.ref(stack))
            raise torch.OutOfMemoryError("CUDA out of memory (played)")
        return merges(plan, **options)

    monkeypatch.setattr(merging, "run_plan", starved)
    monkeypatch.setattr(service._arena, "give_back", lambda: given_back.append(held[-1]() is None))

    async def scenario(link):
        if short_of_memory == 1:
            await prepare(link, "a")
            assert service.store.describe()["bytes"] == SIZE
        else:
            with pytest.raises(ControlError, match="out of memory"):
                await prepare(link, "a")
            await prepare(link, "b")  # and the next one is not harmed

    talk(service, scenario)
    assert given_back == [True]


def test_the_line_tells_how_long_it_is():
    def job(name):
        return Job(SimpleNamespace(digest=name, kind="recipe"), None)

    line = Line(2)
    assert line.retry_after() == 5
    line.put(job("a"))
    assert line.get().status == "merging"
    assert line.retry_after() == 10
    for _ in range(50):
        line.ended(0.02)
    assert line.retry_after() == 1
    line.put(job("b"))
    c = job("c")
    line.put(c)
    with pytest.raises(TooManyMerges) as full:
        line.put(job("d"))
    assert full.value.retry_after == 1
    assert line.remove(c)
    assert not line.remove(c)
    line.put(job("d"))


# -- pins, leases, ids --------------------------------------------------------------------------------------------------


def test_pins_are_of_the_worker_and_outlast_their_session(serve, merges):
    service = serve(cache_bytes=2 * SIZE)

    async def pin(link):
        await prepare(link, "a")
        await link.call("pin", digest=digest("a"))
        await prepare(link, "b")
        with pytest.raises(ControlError, match="no room"):
            await link.call("pin", digest=digest("b"))
        with pytest.raises(ControlError, match="warm it first"):
            await link.call("pin", digest=digest("c"))

    async def stays(link):
        for name in "bcd":
            await prepare(link, name)
        assert (await prepare(link, "a"))["tier"] == "cache"
        assert not (await link.call("evict", digest=digest("a")))["evicted"]
        assert (await link.call("unpin", digest=digest("a")))["unpinned"]
        assert (await link.call("evict", digest=digest("a")))["evicted"]

    talk(service, pin)
    talk(service, stays)


def test_who_gave_up_before_the_artifact_came_gets_no_lease(serve, merges):
    service = serve()
    merges.go.clear()

    async def scenario(link):
        late = asyncio.create_task(prepare(link, "a", lease=True))
        await until(lambda: merges.started == ["a"])
        await link.call("release", digest=digest("a"))
        merges.go.set()
        await late
        (row,) = (await link.call("status"))["artifacts"]
        assert row["leases"] == 0
        await prepare(link, "a", lease=True)
        (row,) = (await link.call("status"))["artifacts"]
        assert row["leases"] == 1

    talk(service, scenario)


def test_a_broken_promise_is_known_before_the_step_goes_on(serve, merges):
    service = serve()
    request = SimpleNamespace(lora_name="a@1", lora_int_id=lora_id(digest("a")), lora_path=lora_path(digest("a")))

    async def scenario(link):
        await prepare(link, "a")
        assert (await link.call("broken", lora_id=request.lora_int_id))["reason"] is None
        await link.call("evict", digest=digest("a"))
        await until(lambda: service.store.peek(digest("a")) is None)
        assert link.alarms == 0
        assert service.load(request).zero, "nothing raises in vLLM's thread"
        assert link.alarms == 1
        assert "not in memory" in (await link.call("broken", lora_id=request.lora_int_id))["reason"]
        with pytest.raises(ControlError, match="loaded wrongly") as error:
            await prepare(link, "a")
        assert error.value.kind == "conflict"

    talk(service, scenario)


def test_vllm_is_given_a_name_and_never_a_tensor(serve, merges):
    service = serve()

    async def scenario(link):
        await prepare(link, "a")
        number = lora_id(digest("a"))
        model = service.load(SimpleNamespace(lora_name="a@1", lora_int_id=number, lora_path=lora_path(digest("a"))))
        kept = [value for value in vars(model).values() if isinstance(value, torch.Tensor)]
        assert (model.vllm_merge_digest, kept) == (digest("a"), [])
        copied = service.fill(model, 0)  # a model whose slots vLLM fills itself
        assert torch.equal(copied.factors["m"][0], torch.full((4, 64), float(ord("a"))))
        await link.call("evict", digest=digest("a"))
        await until(lambda: service.store.peek(digest("a")) is None)
        assert service.fill(model, 0) is None
        assert link.alarms == 1

    talk(service, scenario)


def test_claims_are_forgotten_when_nothing_depends_on_them():
    used = {3}
    claims = Claims(lambda number, owner: number in used, limit=10)
    claims.break_(1000, "it was gone")
    for number in range(200):
        assert claims.claim(number, f"digest {number}") is None
        assert len(claims) <= 10
    assert claims.claim(3, "another") == "digest 3"
    assert claims.claim(0, "another") is None, "0 was forgotten"
    assert claims.claim(1000, "another") is not None, "a broken one is never given away"
    assert claims.reason(1000) == "it was gone"
    used.update(range(200))
    for number in range(200, 230):
        claims.claim(number, "more")
    assert claims.claim(199, "another") == "digest 199"


def test_threads_that_hand_over_quickly_set_back_what_was():
    before = sys.getswitchinterval()
    with quick_switches:
        inside = sys.getswitchinterval()
        with quick_switches:
            pass
        assert sys.getswitchinterval() == inside < before, "another thread is still inside"
    assert sys.getswitchinterval() == before
