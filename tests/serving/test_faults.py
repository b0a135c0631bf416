# SPDX-License-Identifier: Apache-2.0
"""Faults, each injected several times into a server whose vLLM is played: nothing hangs, no answer is another artifact's,
nothing grows, and the next requests work. What is seen is the table of docs/architecture/faults.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="vLLM is not installed")

import fsspec
import httpx
import torch
import yaml
from fsspec.implementations.memory import MemoryFileSystem

from tests.serving.fault_table import plain, seen
from tests.serving.played_server import (
    NOTHING,
    STEPS,
    PlayedServer,
    leftovers,
    patched,
    played,
    recipe_file,
    write_adapter,
)
from vllm_merge.serving import compat
from vllm_merge.serving.control import front
from vllm_merge.serving.memory import reservations, tiers
from vllm_merge.serving.worker import merging as merging_thread
from vllm_merge.serving.worker import placing

NAMES = ("m0", "m1", "m2", "m3", "m4", "m5", "a1", "assistant")
ROUNDS = 3
SIZE = 2 * (4 + 4) * (48 + 32) * 4  # bytes of a merge of two adapters of rank 4

Fault = Callable[[PlayedServer], Awaitable[Sequence[httpx.Response]]]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, list[str]]:
    """{label: tokens} of servers that have only ever served that one artifact."""
    answers = {}
    for name in sorted({*NAMES, "a0", "a2", "a3"}):
        config = recipe_file(tmp_path_factory.mktemp("alone"))

        async def ask(server: PlayedServer, name: str = name) -> tuple[str, list[str]]:
            reply = (await server.ask(name)).json()
            return reply["model"], reply["tokens"]

        label, tokens = played(ask, config)
        answers[label] = tokens
    artifacts = {label.partition("@")[2]: tokens for label, tokens in answers.items()}
    assert len({tuple(tokens) for tokens in artifacts.values()}) == len(artifacts)
    assert all(tokens[0] != NOTHING and len(tokens) == STEPS for tokens in artifacts.values())
    return answers


@contextlib.contextmanager
def held_merges() -> Iterator[threading.Event]:
    """Merges that stop before they begin, until the event is set; each still hears that it is to stop."""
    go, run_plan = threading.Event(), merging_thread.run_plan

    def held(plan: Any, *, cancelled: Callable[[], bool], **more: Any) -> Any:
        while not go.wait(0.005) and not cancelled():
            pass
        return run_plan(plan, cancelled=cancelled, **more)

    with patched(merging_thread, run_plan=held):
        try:
            yield go
        finally:
            go.set()


async def merging(server: PlayedServer, name: str) -> None:
    """Until the merge of a name has begun."""
    digest = server.front.known(name).digest
    await server.until(lambda: (job := server.service._making.jobs.get(digest)) is not None and job.status == "merging")


async def forget(server: PlayedServer, *names: str) -> None:
    """Let names be cold again."""
    await server.idle()
    for name in names:
        await server.admin("POST", f"artifacts/{name}/evict")
    await server.idle()


# -- the faults -----------------------------------------------------------------------------------------------------------


async def line_breaks(server: PlayedServer) -> list[httpx.Response]:
    """The connection to the worker is lost while it merges, and made again."""
    await forget(server, "m0", "m1")
    with held_merges() as go:
        asking = [asyncio.ensure_future(server.ask(name)) for name in ("m0", "m0", "assistant", "m1")]
        await merging(server, "m0")
        await server.break_line()
        replies = await asyncio.gather(*asking)
        go.set()
    await server.until(lambda: server.front.connected)
    return list(replies)


async def truncated(server: PlayedServer) -> list[httpx.Response]:
    """An adapter's file loses its end after it was hashed for the plan and before the merge reads it."""
    await forget(server, "m0")
    weights = server.files / "a0" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    try:
        return [await server.ask("m0"), await server.ask("m2")]
    finally:
        weights.write_bytes(whole)


async def truncated_while_read(server: PlayedServer) -> list[httpx.Response]:
    """It loses its end after the first byte was read."""
    await forget(server, "m0")
    weights = server.files / "a0" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    fstat = front_of_read(weights, lambda: weights.write_bytes(whole[:100]))
    try:
        with fstat:
            return [await server.ask("m0")]
    finally:
        weights.write_bytes(whole)


@contextlib.contextmanager
def front_of_read(path: Path, change: Callable[[], object]) -> Iterator[None]:
    """Once, `change` happens between the look at the file's size and the reading of it."""
    from vllm_merge.adapters import reading

    original, done = reading.os.fstat, threading.Event()

    class Os:
        def __getattr__(self, name: str) -> Any:
            return getattr(__import__("os"), name)

        @staticmethod
        def fstat(number: int) -> Any:
            status = original(number)
            if not done.is_set() and path.stat().st_ino == status.st_ino:
                done.set()
                change()
            return status

    with patched(reading, os=Os()):
        yield
    assert done.is_set()


async def swapped(server: PlayedServer) -> list[httpx.Response]:
    """Another adapter's file lies where the planned one was."""
    await forget(server, "m0")
    folder = server.files / "a0"
    write_adapter(folder, 77)
    try:
        return [await server.ask("m0"), await server.ask("a0")]
    finally:
        write_adapter(folder, 0)


async def not_a_number(server: PlayedServer) -> list[httpx.Response]:
    """One value of one tensor of an adapter is NaN."""
    return [await server.ask("sick"), await server.ask("m1")]


def raised_by_the_engine(error: Callable[[], Exception], *names: str) -> Fault:
    async def fault(server: PlayedServer) -> list[httpx.Response]:
        from vllm_merge import plan_runner

        await forget(server, *names)

        def fails(*arguments: Any, **more: Any) -> Any:
            raise error()

        with patched(plan_runner, merge=fails):
            return list(await asyncio.gather(*(server.ask(name) for name in names)))

    return fault


async def no_memory_for_the_result(server: PlayedServer) -> list[httpx.Response]:
    """The device has no room for the merged factors."""
    await forget(server, "m0")

    def fails(*arguments: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory (injected)")

    with patched(placing, flat_copy=fails):
        return [await server.ask("m0")]


async def no_memory_in_a_step(server: PlayedServer) -> list[httpx.Response]:
    """vLLM's thread finds no memory while it fills a slot: there an exception would end the engine."""
    await forget(server, "m0")
    server.empty_slots()
    original = compat.packed_lora_model
    left = [1]

    def fails(*arguments: Any) -> Any:
        if left:
            left.pop()
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        return original(*arguments)

    with patched(compat, packed_lora_model=fails):
        return [await server.ask("m0"), await server.ask("m0")]


async def client_gone(server: PlayedServer) -> list[httpx.Response]:
    """Clients leave while their artifact is merged; one stays."""
    await forget(server, "m0", "m1")
    with held_merges() as go:
        asking = [asyncio.ensure_future(server.ask(name)) for name in ("m0", "m0", "m1")]
        staying = asyncio.ensure_future(server.ask("m0"))
        await merging(server, "m0")
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        go.set()
        return [await staying]


async def sixty_four(server: PlayedServer) -> list[httpx.Response]:
    """64 requests for 16 cold recipes, while vLLM has 2 slots and the cache room for 4 artifacts."""
    names = [f"c{i % 16}" for i in range(64)]
    return list(await asyncio.gather(*(server.ask(name) for name in names)))


async def cancelled(server: PlayedServer) -> list[httpx.Response]:
    """An administrator cancels a merge for which requests wait."""
    await forget(server, "m0")
    with held_merges():
        asking = [asyncio.ensure_future(server.ask(name)) for name in ("m0", "assistant")]
        await merging(server, "m0")
        assert (await server.admin("DELETE", "merges/m0")).json()["cancelled"]
        return list(await asyncio.gather(*asking))


async def rewritten(server: PlayedServer) -> list[httpx.Response]:
    """The recipe file is written anew in a loop, every third time wrong, while requests run."""
    document = yaml.safe_load(server.config.read_text())
    replies: list[httpx.Response] = []
    done = asyncio.Event()

    async def load(name: str) -> None:
        while not done.is_set():
            replies.append(await server.ask(name))

    loads = [asyncio.ensure_future(load(name)) for name in ("m0", "m1", "assistant", "a1")]
    for i in range(9):
        text = yaml.safe_dump({**document, "aliases": {"assistant": f"m{i % 3}"}})
        server.config.write_text(text if i % 3 != 2 else text[:40] + f"\n{i}: [")
        await server.look()
    server.config.write_text(yaml.safe_dump(document))
    await server.look()
    done.set()
    await asyncio.gather(*loads)
    return replies


async def everything_leased(server: PlayedServer) -> list[httpx.Response]:
    """Running requests hold all of the cache; another artifact is asked for meanwhile."""
    await forget(server, *NAMES[:6])
    await server.until(lambda: server.service.store.describe()["bytes"] < SIZE)
    server.engine.steps.clear()
    long = [asyncio.ensure_future(server.ask(name)) for name in ("m0", "m1", "m2", "m3")]
    await server.until(lambda: sum(server.service.store._leases.values()) == 4)
    await server.until(lambda: not server.service._making.jobs)
    with patched(placing, ROOM_SECONDS=0.1):
        refused = await server.ask("m4")
    waiting = asyncio.ensure_future(server.ask("m5"))
    await merging(server, "m5")
    server.engine.steps.set()
    return [refused, await waiting, *await asyncio.gather(*long)]


async def api_process_dies(server: PlayedServer) -> list[httpx.Response]:
    """One of four API processes ends: it has the turn to change what is served, a request that runs, and one that waits for a
    merge which a process that stays wants too.
    """
    await forget(server, "m0", "m1", "m2")
    dying, staying = server.apis[3], server.apis[:3]
    server.engine.steps.clear()
    with held_merges() as go:
        asking = [asyncio.ensure_future(api.ask(name)) for api in staying for name in ("m0", "m1")]
        lost = [asyncio.ensure_future(dying.ask(name)) for name in ("m0", "m2", "a3")]
        turn = dying.published._shared.turn()
        await turn.__aenter__()
        moving = asyncio.ensure_future(server.admin("POST", "aliases/assistant", target="m2"))
        await merging(server, "m0")
        await dying.end()
        server.apis.remove(dying)
        go.set()
    server.engine.steps.set()
    await asyncio.gather(*lost, return_exceptions=True)
    with contextlib.suppress(Exception):
        await turn.__aexit__(None, None, None)
    replies = await asyncio.gather(*asking)
    assert (await moving).json()["target"] == "m2"
    assert (await server.admin("POST", "aliases/assistant", target="m0")).status_code == 200
    await server.add_api()
    return replies


class Brittle(MemoryFileSystem):
    """A place that takes no more bytes, or fails altogether, or hangs."""

    protocol = "brittle"
    store: dict[str, Any] = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012
    fails: int | None = None
    answers = threading.Event()
    answers.set()
    reads_too = False

    def _open(self, path: str, mode: str = "rb", **more: Any) -> Any:
        type(self).answers.wait()
        if type(self).fails is not None and ("r" not in mode or type(self).reads_too):
            raise OSError(type(self).fails, "injected", path)
        return super()._open(path, mode=mode, **more)


fsspec.register_implementation("brittle", Brittle, clobber=True)


def place_fails(number: int, *, reads_too: bool = False) -> Fault:
    async def fault(server: PlayedServer) -> list[httpx.Response]:
        await server.ask("m0")
        await server.idle()  # m0 is on the disk
        before = dict(server.service._served)
        with patched(Brittle, fails=number, reads_too=reads_too):
            replies = [await server.ask(name) for name in ("m1", "m2", "m3", "m4", "m5", "a1")]
            assert server.service.store.peek(server.front.known("m0").digest) is None
            replies.append(await server.ask("m0"))
            await server.idle()
        came_back = server.service._served["disk"] > before.get("disk", 0)
        assert came_back is not reads_too, "what can be read is read, although nothing can be written beside it"
        return replies

    return fault


async def place_hangs(server: PlayedServer) -> list[httpx.Response]:
    """The disk tier answers neither writers nor readers, until it does."""
    await server.ask("m0")
    await server.idle()
    failed = server.service._tiers.disk_errors
    for name in ("m1", "m2", "m3"):  # m0 leaves the cache
        await server.ask(name)
    await forget(server, "m0")
    with patched(Brittle, answers=threading.Event()), patched(tiers, DISK_SECONDS=0.05):
        with patched(reservations, ANSWER_SECONDS=0.05):
            replies = [await server.ask(name) for name in ("m0", "m4", "m5", "a1")]
        Brittle.answers.set()
        await server.idle()
    assert server.service._tiers.disk_errors > failed
    return replies


async def disk_damaged(server: PlayedServer) -> list[httpx.Response]:
    """A byte of an artifact on disk changes while nobody has it in memory."""
    await server.ask("m0")
    await server.idle()
    for name in ("m1", "m2", "m3", "m4", "m5"):
        await server.ask(name)
    await forget(server, "m0")
    digest = server.front.known("m0").digest
    (path,) = (p for p in Brittle.store if digest in p and p.endswith("safetensors"))
    content = bytearray(Brittle.store[path].getvalue())
    content[-1] ^= 1
    Brittle().pipe_file(path, bytes(content))
    return [await server.ask("m0")]


DISK = {"DISK": "brittle://merges", "CACHE_BYTES": 2 * SIZE}
BUSY = {"CACHE_BYTES": 4 * SIZE}

FAULTS: dict[str, tuple[Fault, dict[str, Any]]] = {
    "the line to the worker breaks during a merge": (line_breaks, {}),
    "an adapter's file is truncated between plan and merge": (truncated, {"SOURCE_BYTES": 0}),
    "an adapter's file is truncated while it is read": (truncated_while_read, {"SOURCE_BYTES": 0}),
    "an adapter's file is replaced between plan and merge": (swapped, {"SOURCE_BYTES": 0}),
    "NaN in one tensor of an adapter": (not_a_number, {}),
    "CUDA out of memory in a merge": (
        raised_by_the_engine(lambda: torch.OutOfMemoryError("CUDA out of memory (injected)"), "m0", "assistant"),
        {},
    ),
    "CUDA out of memory for a merge's result": (no_memory_for_the_result, {}),
    "CUDA out of memory while a slot is filled": (no_memory_in_a_step, {}),
    "an error in a merge that nobody foresaw": (raised_by_the_engine(lambda: ZeroDivisionError("injected"), "m0"), {}),
    "clients leave while their artifact is merged": (client_gone, {}),
    "a merge is cancelled": (cancelled, {}),
    "64 requests for 16 cold recipes, 2 slots": (sixty_four, BUSY),
    "running requests hold all of the cache": (everything_leased, BUSY),
    "one of 4 API processes dies": (api_process_dies, {"apis": 4}),
    "the recipe file is rewritten in a loop under load": (rewritten, {}),
    "the disk tier is full": (place_fails(errno.ENOSPC), DISK),
    "the disk tier is read-only": (place_fails(errno.EROFS), DISK),
    "the disk tier fails altogether": (place_fails(errno.EIO, reads_too=True), DISK),
    "the disk tier hangs": (place_hangs, DISK),
    "an artifact on disk is damaged": (disk_damaged, DISK),
}


def with_more_recipes(config: Path) -> None:
    """`sick` uses an adapter with a NaN; c0 … c15 are sixteen recipes that nothing else asks for."""
    files = config.parent
    write_adapter(files / "nan", 5)
    from safetensors.torch import load_file, save_file

    tensors = load_file(files / "nan" / "adapter_model.safetensors")
    tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"][3, 2] = float("nan")
    save_file(tensors, files / "nan" / "adapter_model.safetensors")
    document = yaml.safe_load(config.read_text())
    document["adapters"]["nan"] = {"path": "./nan"}
    pair = [{"adapter": "a1"}, {"adapter": "nan"}]
    document["recipes"]["sick"] = {"merge_method": "linear", "adapters": pair, "load": "lazy"}
    for i in range(16):
        inputs = [{"adapter": "a0", "parameters": {"weight": 2.0 + i}}, {"adapter": "a3"}]
        document["recipes"][f"c{i}"] = {"merge_method": "linear", "adapters": inputs, "load": "lazy"}
    config.write_text(yaml.safe_dump(document))


@pytest.mark.parametrize("name", FAULTS)
def test_fault(name, tmp_path, alone):
    fault, settings = FAULTS[name]
    config = recipe_file(tmp_path)
    with_more_recipes(config)
    Brittle.store.clear()

    async def scenario(server: PlayedServer) -> tuple[Counter[str], Counter[str], list[str]]:
        met: list[httpx.Response] = []
        after: list[httpx.Response] = []
        left: dict[str, int] = {}
        for number in range(ROUNDS):
            met += await fault(server)
            await asyncio.sleep(2 * front.FAILURE_SECONDS)  # a failure that may have passed is tried again
            after += [await server.ask(wanted) for wanted in NAMES]
            after += await asyncio.gather(*(server.ask(wanted) for wanted in NAMES))
            await server.idle()
            if number == 0:
                left = leftovers(server)
        check_answers(server, [*met, *after], alone)
        return outcomes(met), outcomes(after), await grown_since(server, left)

    with patched(front, FAILURE_SECONDS=0.05):
        met, after, grown = played(scenario, config, **settings)
    seen(name, "played", listed(met), ", ".join(grown) or "nothing", listed(after))
    assert not grown
    assert set(after) == {"right answer"}


async def grown_since(server: PlayedServer, before: dict[str, int]) -> list[str]:
    """What there is more of, and stays so: what is only slow to go is waited for."""
    for _ in range(100):
        now = leftovers(server)
        grown = [f"{what}: {now[what] - before[what]} more" for what in before if now[what] > before[what]]
        if not grown:
            break
        await asyncio.sleep(0.1)
    return grown


def check_answers(server: PlayedServer, replies: Sequence[httpx.Response], alone: dict[str, list[str]]) -> None:
    for reply in replies:
        if reply.status_code == 200 and (label := reply.json()["model"]) in alone:
            assert reply.json()["tokens"] == alone[label], f"{label} answered with other weights than its own"
            assert reply.headers["x-vllm-merge-artifact"] == label
        elif reply.status_code == 200:
            assert label.startswith("c"), "only the sixteen are not known beforehand"
    tokens: dict[str, set[tuple[str, ...]]] = {}
    for reply in replies:
        if reply.status_code == 200:
            tokens.setdefault(reply.json()["model"].partition("@")[2], set()).add(tuple(reply.json()["tokens"]))
    assert all(len(found) == 1 for found in tokens.values()), "one artifact, one answer"
    assert len({next(iter(found)) for found in tokens.values()}) == len(tokens), "another artifact, another answer"


def outcomes(replies: Sequence[httpx.Response]) -> Counter[str]:
    return Counter(outcome(reply) for reply in replies)


def outcome(reply: httpx.Response) -> str:
    if reply.status_code == 200:
        return "right answer"
    message = plain(reply.json()["error"]["message"]).replace("`", "")
    after = f", retry after {reply.headers['retry-after']} s" if "retry-after" in reply.headers else ", not retried"
    message = message.removeprefix(f"The model {reply.headers['x-vllm-merge-name']} cannot be served: ")
    return f"{reply.status_code}{after}: “{message}”"


def listed(found: Counter[str]) -> str:
    """Each outcome once; how often a right answer came depends on the machine in some faults, so it is not said."""
    return "; ".join(sorted(found, reverse=True)) or "none"
