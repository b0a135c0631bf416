# SPDX-License-Identifier: Apache-2.0
"""While vLLM sleeps nothing of ours works, and what was stopped for it is done afterwards."""

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.serving.played_cuda import WORKSPACE, PlayedCuda
from tests.serving.test_worker import digest, merges, prepare, serve, talk  # noqa: F401  (fixtures)
from vllm_merge.errors import MergeCancelled
from vllm_merge.serving import compat
from vllm_merge.serving.identity import FIRST_ID
from vllm_merge.serving.memory import arena as arena_module
from vllm_merge.serving.memory.arena import Arena
from vllm_merge.serving.worker import sleep
from vllm_merge.serving.worker import worker as worker_module
from vllm_merge.serving.worker.sleep import Wakefulness, outside_memory_pools


class Merge:
    """Runs until it is told to end; stops at its next batch when vLLM falls asleep."""

    def __init__(self, wakefulness: Wakefulness):
        self.wakefulness = wakefulness
        self.begun: list[float] = []
        self.end = threading.Event()
        self.results: list[str] = []
        self.thread = threading.Thread(target=lambda: self.results.append(wakefulness.awake(self._run)), daemon=True)

    def _run(self) -> str:
        self.begun.append(time.monotonic())
        while not self.end.wait(0.005):
            if self.wakefulness.asleep:
                raise MergeCancelled("asleep")
        return "merged"


def wait_until(condition) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_merge_that_runs_stops_for_sleep_and_begins_anew_after_it():
    wakefulness = Wakefulness()
    merge = Merge(wakefulness)
    merge.thread.start()
    wait_until(lambda: merge.begun)
    assert wakefulness.fall_asleep(), "it has stopped when this returns"
    time.sleep(0.05)
    assert len(merge.begun) == 1
    assert not merge.results
    woken = time.monotonic()
    wakefulness.wake_up(None, lambda: None)
    merge.end.set()
    merge.thread.join(5)
    assert merge.results == ["merged"]
    assert merge.begun[1] > woken


def test_nothing_begins_before_everything_is_awake():
    wakefulness, order = Wakefulness(), []
    wakefulness.fall_asleep()
    merge = Merge(wakefulness)
    merge.end.set()
    merge.thread.start()
    wakefulness.wake_up(["weights"], lambda: order.append("too early"))
    time.sleep(0.05)
    assert not merge.begun
    wakefulness.wake_up(["kv_cache"], lambda: order.append(f"first, {len(merge.begun)} begun"))
    merge.thread.join(5)
    assert merge.results == ["merged"]
    assert order == ["first, 0 begun"]


def test_a_merge_that_was_cancelled_for_another_reason_stays_cancelled():
    def work():
        raise MergeCancelled("nobody waits")

    with pytest.raises(MergeCancelled, match="nobody waits"):
        Wakefulness().awake(work)


def test_a_merge_that_does_not_stop_is_not_waited_for_forever(monkeypatch):
    monkeypatch.setattr(sleep, "STOP_SECONDS", 0.05)
    wakefulness = Wakefulness()
    stuck = threading.Event()
    thread = threading.Thread(target=lambda: wakefulness.awake(stuck.wait), daemon=True)
    thread.start()
    wait_until(lambda: wakefulness._running == 1)
    assert not wakefulness.fall_asleep()
    stuck.set()
    thread.join(5)


def test_waking_up_without_having_slept_takes_nothing():
    taken = []
    Wakefulness().wake_up(None, lambda: taken.append(1))
    assert not taken


def test_what_must_outlive_sleep_is_made_by_another_thread_whose_errors_arrive():
    assert outside_memory_pools(torch.device("cpu"), threading.get_ident) != threading.get_ident()
    with pytest.raises(ZeroDivisionError):
        outside_memory_pools(torch.device("cpu"), lambda: 1 / 0)


def test_the_hooks_run_around_vllms_own(monkeypatch):
    pytest.importorskip("vllm")
    from vllm.v1.worker.gpu_worker import Worker

    said = []
    monkeypatch.setattr(Worker, "sleep", lambda self, level=1: said.append(f"sleep {level}"))
    monkeypatch.setattr(Worker, "wake_up", lambda self, tags=None: said.append("wake"))
    compat.wrap_sleep(lambda: said.append("before"), lambda tags: said.append(tags))
    compat.wrap_sleep(lambda: said.append("twice"), lambda tags: said.append("twice"))
    Worker.sleep(None, 2)
    Worker.wake_up(None, ["weights"])
    Worker.wake_up(None)
    assert said == ["before", "sleep 2", "wake", ["weights"], "wake", None]


def test_a_worker_that_sleeps_holds_what_requests_hold_and_merges_after_waking(serve, merges):  # noqa: F811
    service = serve(host_bytes=0)
    out_of_slots = []
    worker_module.compat.remove_adapters = lambda manager, first_id: out_of_slots.append(first_id)

    async def scenario(link):
        await prepare(link, "a")
        await prepare(link, "b", lease=True)
        await asyncio.to_thread(service.fall_asleep)
        assert out_of_slots == [FIRST_ID], "nothing of ours stays in a slot"
        assert {row["digest"] for row in (await link.call("status"))["artifacts"]} == {digest("b")}
        waiting = asyncio.create_task(prepare(link, "c"))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        assert merges.started == ["a", "b"]
        service.wake_up(["weights"])
        await asyncio.sleep(0.05)
        assert merges.started == ["a", "b"]
        service.wake_up(["kv_cache"])
        await waiting
        await prepare(link, "a")
        assert merges.started == ["a", "b", "c", "a"]

    talk(service, scenario)


def test_a_merge_that_sleep_stopped_is_done_after_waking(serve, merges):  # noqa: F811
    service = serve()
    worker_module.compat.remove_adapters = lambda manager, first_id: None

    async def scenario(link):
        merges.go.clear()
        waiting = asyncio.create_task(prepare(link, "a"))
        while not merges.started:
            await asyncio.sleep(0.005)
        await asyncio.to_thread(service.fall_asleep)
        assert merges.ended == ["a stopped"]
        assert not waiting.done()
        merges.go.set()
        service.wake_up(None)
        await waiting
        assert merges.ended == ["a stopped", "a"]

    talk(service, scenario)


SIZE = 1000


def played(monkeypatch, capacity: int) -> tuple[PlayedCuda, Arena]:
    device = torch.device("cuda", 0)
    cuda = PlayedCuda(capacity)
    monkeypatch.setattr(arena_module, "torch", cuda)
    return cuda, Arena(device, SIZE)


def multiply(cuda: PlayedCuda, arena: Arena, size: int = 100) -> None:
    """A merge: something is allocated, a product is made."""
    with arena.use():
        matrix = cuda.empty(size)
        matrix @ matrix


def in_another_thread(work) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()


def test_workspaces_of_any_thread_lie_outside_of_an_arena(monkeypatch):
    cuda, arena = played(monkeypatch, 10 * SIZE)
    multiply(cuda, arena)
    multiply(cuda, arena)
    assert cuda.taken == SIZE + WORKSPACE, "one for each thread"
    arena.take(0)
    in_another_thread(lambda: multiply(cuda, arena))
    assert cuda.taken == SIZE + 2 * WORKSPACE
    arena.take(0)
    assert cuda.taken == SIZE + 2 * WORKSPACE, "no second arena"
    arena.give_back()
    assert cuda.taken == 2 * WORKSPACE
    arena.take(0)
    assert cuda.taken == SIZE + 2 * WORKSPACE


def test_workspaces_inside_of_an_arena_would_cost_a_second_one(monkeypatch):
    """What the test above is for."""
    cuda, arena = played(monkeypatch, 10 * SIZE)
    monkeypatch.setattr(Arena, "_settle_libraries", lambda self: None)
    multiply(cuda, arena)
    arena.take(0)
    assert cuda.taken == 2 * SIZE
    arena.give_back()
    assert cuda.taken == SIZE


def test_a_device_without_memory_for_a_workspace_gives_it_from_the_arena(monkeypatch):
    cuda, arena = played(monkeypatch, SIZE)
    multiply(cuda, arena)
    assert cuda.taken == SIZE
    arena.give_back()
    assert cuda.taken == SIZE, "that workspace stays"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_an_arena_gives_its_memory_back_and_takes_it_again():
    device, size = torch.device("cuda", torch.cuda.current_device()), 256 << 20
    arena = Arena(device, size)
    with arena.use():
        pass
    before = torch.cuda.mem_get_info(device)[0]
    arena.give_back()
    given = torch.cuda.mem_get_info(device)[0]
    assert given - before >= size
    arena.take(0)
    assert given - torch.cuda.mem_get_info(device)[0] >= size


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_what_libraries_keep_costs_no_second_arena():
    """cuBLAS keeps a workspace for each thread and stream, which torch takes from where the stream's memory is."""
    device, size = torch.device("cuda", torch.cuda.current_device()), 256 << 20

    def work() -> None:
        matrix = torch.randn(3, 256, 256, device=device, dtype=torch.float64)
        torch.linalg.eigh(matrix @ matrix.mT)
        single = matrix.float()
        torch.baddbmm(single, single, single)
        torch.addmm(single[0, 0], single[0] @ single[1], single[2])

    def in_arena() -> None:
        with arena.use():
            work()

    with ThreadPoolExecutor(1) as other:  # as the thread that merges is not the one that makes the arena
        work()  # what the libraries take once for each thread
        other.submit(work).result()
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        before = torch.cuda.mem_get_info(device)[0]
        arena = Arena(device, size)
        in_arena()
        other.submit(in_arena).result()
        arena.take(0)
        assert before - torch.cuda.mem_get_info(device)[0] < 1.5 * size
        arena.give_back()
        assert before - torch.cuda.mem_get_info(device)[0] < size / 2
