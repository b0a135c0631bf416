# SPDX-License-Identifier: Apache-2.0
"""One state for all API processes: changes count once every process has them, whoever joins, hangs or ends meanwhile."""

import asyncio
import contextlib
from pathlib import Path

import pytest

from vllm_merge.recipe_files import load_recipes
from vllm_merge.serving.control import owner as owner_module
from vllm_merge.serving.control.control import ControlError, ControlServer, WorkerLink
from vllm_merge.serving.control.names import Name, Names
from vllm_merge.serving.control.owner import StateOwner
from vllm_merge.serving.control.shared import SharedState
from vllm_merge.serving.control.state import State

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "demo.yaml"


def state(generation: int, target: str = "a") -> State:
    names = {name: Name(name, "recipe", None, reason="played") for name in ("a", "b")}
    names["alias"] = Name("alias", "alias", None, target)
    return State(generation, Names(load_recipes(CONFIG), names, {}))


class Worker:
    """A worker's control line with nothing on it but the owner."""

    def __init__(self):
        self.owner = StateOwner()

    async def handle(self, session, op, message):
        return await self.owner.handle(session, op, message)

    def closed(self, session):
        self.owner.closed(session)


class Api:
    """An API process: what it answers for `alias`, and whether it takes changes over."""

    def __init__(self, path):
        self.answers: str | None = None
        self.awake = asyncio.Event()
        self.awake.set()
        self.waiting: list[dict] = []
        self.link = WorkerLink(path, self._on_event)
        self.shared = SharedState(self.link, self._adopt)

    async def start(self):
        await self.link.connect()
        await self.shared.join()
        return self

    def _adopt(self, new: State) -> None:
        self.answers = new.names.names["alias"].label

    def _on_event(self, event) -> None:
        if self.awake.is_set():
            self.shared.on_event(event)
        else:
            self.waiting.append(event)

    def wake(self) -> None:
        self.awake.set()
        for event in self.waiting:
            self.shared.on_event(event)

    async def move(self, generation: int, target: str) -> None:
        async with self.shared.turn():
            await self.shared.propose(state(generation, target))


@pytest.fixture
def served(tmp_path):
    worker = Worker()
    server = ControlServer(tmp_path / "worker-1.sock", worker)
    server.start()
    yield server.path, worker.owner
    server.stop()


def run(served, scenario, count=4):
    async def main():
        apis = [await Api(served[0]).start() for _ in range(count)]
        try:
            await scenario(apis)
        finally:
            for api in apis:
                await api.link.close()

    asyncio.run(main())


def test_a_change_counts_only_when_every_process_has_it(served):
    async def scenario(apis):
        for number in range(1, 21):
            await apis[number % 4].move(number, "ab"[number % 2])
            assert {api.answers for api in apis} == {"ab"[number % 2]}
            assert served[1].served == number

    run(served, scenario)


def test_changes_of_several_processes_come_one_after_the_other(served):
    async def scenario(apis):
        seen = []

        async def move(api, target):
            async with api.shared.turn() as before:
                seen.append(before.generation if before else 0)
                await asyncio.sleep(0.01)
                await api.shared.propose(state(seen[-1] + 1, target))

        await asyncio.gather(*(move(api, "a") for api in apis), *(move(api, "b") for api in apis))
        assert seen == list(range(8))

    run(served, scenario)


def test_a_process_that_does_not_answer_holds_the_change_up_and_is_named(served, monkeypatch):
    async def scenario(apis):
        await apis[0].move(1, "a")
        monkeypatch.setattr(owner_module, "ADOPT_SECONDS", 0.3)
        apis[3].awake.clear()
        with pytest.raises(ControlError, match=r"API process \d+ has not answered") as late:
            await apis[0].move(2, "b")
        assert late.value.kind == "busy"
        assert (served[1].served, apis[3].answers, apis[0].answers) == (1, "a", "b")
        assert apis[0].shared.as_of(1).generation == 1, "what counts is still what the late one has"
        with pytest.raises(ControlError, match="has not answered"):
            await apis[1].move(3, "a")
        apis[3].wake()
        monkeypatch.undo()
        await apis[1].move(3, "a")
        assert {api.answers for api in apis} == {"a"}
        assert served[1].served == 3

    run(served, scenario)


def test_nobody_waits_for_a_process_that_ends(served):
    async def scenario(apis):
        apis[3].awake.clear()
        moving = asyncio.create_task(apis[0].move(1, "b"))
        await asyncio.sleep(0.05)
        assert not moving.done()
        await apis[3].link.close()
        await moving
        assert {api.answers for api in apis[:3]} == {"b"}

    run(served, scenario)


def test_the_turn_of_a_process_that_ends_goes_on_to_the_next(served):
    async def scenario(apis):
        async def forever():
            async with apis[0].shared.turn():
                await asyncio.Event().wait()

        stuck = asyncio.create_task(forever())
        await asyncio.sleep(0.05)
        waiting = [asyncio.create_task(api.move(1 + i, "b")) for i, api in enumerate(apis[1:])]
        waiting[0].cancel()  # its request was given up while it waited
        await asyncio.sleep(0.05)
        assert not any(task.done() for task in waiting[1:])
        await apis[0].link.close()
        await asyncio.wait_for(asyncio.gather(*waiting[1:]), 60)
        assert served[1].served == 2
        stuck.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await stuck

    run(served, scenario)


def test_who_joins_or_comes_back_has_the_newest_state_before_it_serves_anything(served):
    async def scenario(apis):
        await apis[0].move(1, "b")
        late = await Api(served[0]).start()
        assert late.answers == "b"
        await apis[1].link.close()
        await apis[0].move(2, "a")
        assert apis[1].answers == "b"
        await apis[1].link.connect()
        assert apis[1].answers == "a"
        await apis[1].move(3, "b")
        assert {api.answers for api in (*apis, late)} == {"b"}
        await late.link.close()

    run(served, scenario)


def test_a_change_needs_the_turn(served):
    async def scenario(apis):
        with pytest.raises(ControlError, match="the turn"):
            await apis[0].shared.propose(state(1))

    run(served, scenario, count=1)
