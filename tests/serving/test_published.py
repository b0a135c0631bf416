# SPDX-License-Identifier: Apache-2.0
"""Two API processes and one recipe file: read once, served by both alike; moved aliases; what vLLM unloaded stays away."""

import asyncio
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.serving.test_owner import Worker
from vllm_merge.errors import UserInputError
from vllm_merge.recipe_files import load_recipes
from vllm_merge.serving.control import published as published_module
from vllm_merge.serving.control.control import ControlServer, WorkerLink
from vllm_merge.serving.control.names import Name, Names
from vllm_merge.serving.control.published import Published, Rewritten, stamp_of

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "demo.yaml"
RECIPES = load_recipes(CONFIG)


class Front:
    """A front door that reads a file of one line: the target of the alias `x`, or `wrong`."""

    def __init__(self, config: Path):
        self.config = config
        self.reads = 0
        self.warmed: list[str] = []
        self.names: dict[str, Name] = {}

    async def resolve(self, config, registered, added):
        self.reads += 1
        target = self.config.read_text().split()[0]
        if target == "wrong":
            raise UserInputError("line 1 is wrong")
        names = {name: Name(name, "recipe", name[0] * 64, f"{name}@1") for name in ("ties", "linear")}
        names["given"] = Name("given", "adapter", "9" * 64, "given@9")
        names["x"] = replace(names[target], name="x", kind="alias")
        return Names(replace(RECIPES, aliases={"x": target}), names, {})

    def adopt(self, names):
        self.names = dict(names.names)

    def lora_requests(self):
        return {name: SimpleNamespace(lora_path=f"ours://{known.label}") for name, known in self.names.items()}

    listed = lora_requests

    def owns(self, path):
        return path.startswith("ours://")

    def find(self, name):
        return name, self.names[name].label

    async def ready(self, name):
        self.warmed.append(name)

    async def warm_eager(self, names):
        pass


class Process:
    """An API process with vLLM's table of names, `serving`."""

    def __init__(self, socket: Path, config: Path):
        self.front = Front(config)
        given = {"given": SimpleNamespace(lora_path="/adapters/given")}
        self.serving = SimpleNamespace(lora_requests=given, base_model_paths=[], show_available_models=None)
        self.link = WorkerLink(socket, lambda event: self.published.on_event(event))
        self.published = Published(self.front, self.serving, config, self.link)

    @property
    def answers(self) -> str:
        return self.serving.lora_requests["x"].lora_path


@pytest.fixture
def two(tmp_path, monkeypatch):
    """two(scenario) runs scenario(processes, config) with two API processes that have started."""
    monkeypatch.setattr(published_module, "WATCH_SECONDS", 0.02)
    config = tmp_path / "recipes.yaml"
    config.write_text("ties")
    server = ControlServer(tmp_path / "worker-1.sock", Worker())
    server.start()

    def run(scenario):
        async def main():
            processes = [Process(server.path, config) for _ in range(2)]
            for process in processes:
                await process.link.connect()
            await asyncio.gather(*(process.published.start() for process in processes))
            watching = [asyncio.create_task(process.published.watch()) for process in processes]
            await scenario(processes, config)
            for task in watching:
                task.cancel()
            for process in processes:
                await process.link.close()

        asyncio.run(main())

    yield run
    server.stop()


async def until(condition) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


def test_a_file_is_read_by_one_process_and_served_by_all(two):
    async def scenario(processes, config):
        assert sum(process.front.reads for process in processes) == 1
        assert {process.answers for process in processes} == {"ours://ties@1"}
        config.write_text("linear")
        await until(lambda: all(process.answers == "ours://linear@1" for process in processes))
        await asyncio.sleep(0.1)
        assert sum(process.front.reads for process in processes) == 2
        assert {process.published.state.generation for process in processes} == {2}

    two(scenario)


def test_a_wrong_file_is_said_by_all_and_changes_nothing(two):
    async def scenario(processes, config):
        config.write_text("wrong and long")
        await until(lambda: all(process.published.state.error for process in processes))
        assert {process.published.state.error for process in processes} == {"line 1 is wrong"}
        assert {process.published.state.generation for process in processes} == {1}
        assert {process.answers for process in processes} == {"ours://ties@1"}
        config.write_text("linear")
        await until(lambda: all(process.answers == "ours://linear@1" for process in processes))
        assert {process.published.state.error for process in processes} == {None}

    two(scenario)


def test_a_file_is_not_read_while_it_is_written(two):
    async def scenario(processes, config):
        for length in range(60):
            config.write_text("wrong" + " " * length)
            await asyncio.sleep(published_module.WATCH_SECONDS / 4)
        assert sum(process.front.reads for process in processes) == 1
        config.write_text("linear")
        await until(lambda: all(process.answers == "ours://linear@1" for process in processes))
        assert {process.published.state.error for process in processes} == {None}
        assert sum(process.front.reads for process in processes) == 2

    two(scenario)


def test_a_file_is_not_read_while_it_is_written_when_the_turn_comes(two):
    """A process that has found one change at rest waits for the turn, and meanwhile the next one is being written."""

    async def scenario(processes, config):
        ready = asyncio.Event()

        async def wait(name):
            await ready.wait()

        processes[0].front.ready = wait
        moving = asyncio.create_task(processes[0].published.move("x", "linear"))
        await until(lambda: processes[0].front.reads == 1 or processes[1].front.reads == 1)
        config.write_text("linear # at rest")
        looking = asyncio.create_task(processes[1].published._look(stamp_of(config)))
        await asyncio.sleep(4 * published_module.WATCH_SECONDS)  # of the looks that find it at rest and wait, too
        reads = sum(process.front.reads for process in processes)
        ready.set()
        for length in range(40):
            config.write_text("wrong" + " " * length)
            await asyncio.sleep(published_module.WATCH_SECONDS / 4)
        await asyncio.gather(moving, looking)
        assert sum(process.front.reads for process in processes) == reads
        config.write_text("ties")
        await until(lambda: all(process.published.state.stamp == stamp_of(config) for process in processes))
        assert {process.published.state.error for process in processes} == {None}
        assert sum(process.front.reads for process in processes) == reads + 1

    two(scenario)


@pytest.mark.parametrize("half", ["wrong", "linear"], ids=["refused", "served"])
def test_what_was_read_while_it_was_written_does_not_count(two, half):
    async def scenario(processes, config):
        read = []

        async def written_meanwhile(resolve, *arguments):
            read.append(config.read_text())
            try:
                return await resolve(*arguments)
            finally:
                if len(read) == 1:
                    config.write_text("ties # whole")

        for process in processes:  # whichever finds it at rest first
            process.front.resolve = partial(written_meanwhile, process.front.resolve)
        config.write_text(half)
        await until(lambda: len(read) == 2)
        await until(lambda: all(process.published.state.stamp == stamp_of(config) for process in processes))
        assert read == [half, "ties # whole"]
        assert {process.published.state.generation for process in processes} == {2}
        assert {process.published.state.error for process in processes} == {None}
        assert {process.answers for process in processes} == {"ours://ties@1"}

    two(scenario)


def test_nothing_is_added_beside_a_file_that_is_being_written(two):
    async def scenario(processes, config):
        config.write_text("linear # not served yet")
        state = processes[0].published.state
        with pytest.raises(Rewritten, match=r"recipes\.yaml is being changed; ask again when that is served") as raised:
            await processes[0].published._with(state)
        assert (raised.value.kind, raised.value.retry_after) == ("busy", 2)
        await until(lambda: all(process.published.state.generation == 2 for process in processes))
        await processes[0].published._with(processes[0].published.state)

    two(scenario)


def test_a_move_is_everywhere_when_it_is_done_and_its_target_is_ready(two):
    async def scenario(processes, config):
        for number, target in enumerate(["linear", "ties", "linear"]):
            mover = processes[number % 2]
            state = await mover.published.move("x", target)
            assert {process.answers for process in processes} == {f"ours://{target}@1"}
            assert state.generation == number + 2
            assert mover.front.warmed[-1] == target
        with pytest.raises(UserInputError, match="no recipe or adapter 'nobody'"):
            await processes[0].published.move("x", "nobody")
        assert {process.answers for process in processes} == {"ours://linear@1"}

    two(scenario)


def test_a_move_does_not_bring_back_what_vllm_has_unloaded(two):
    async def scenario(processes, config):
        del processes[0].serving.lora_requests["given"]
        await processes[1].published.move("x", "linear")
        assert "given" not in processes[0].serving.lora_requests
        assert "given" in processes[1].serving.lora_requests

    two(scenario)
