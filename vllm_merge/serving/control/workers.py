# SPDX-License-Identifier: Apache-2.0
"""Finding the sockets of exactly the workers that one API process needs: every rank of every engine it talks to."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from vllm_merge.errors import UserInputError
from vllm_merge.serving.control.control import RUNTIME_DIR_VARIABLE, ControlError, Message, WorkerLink

FIND_SECONDS = 60.0
HELLO_SECONDS = 10.0  # how long one worker may take to answer


class Place(NamedTuple):
    """Where a worker stands: the index of its engine (data parallel), and its rank there (tensor × pipeline parallel)."""

    engine: int
    rank: int

    def __str__(self) -> str:
        return f"rank {self.rank} of engine {self.engine}"


def wanted_places(parallel: Any) -> list[Place]:
    """The workers behind an API process with vLLM's `parallel_config`.

    Raises UserInputError if some are on other machines, where no socket of ours reaches them.
    """
    first, engines = 0, int(parallel.data_parallel_size)
    if parallel.local_engines_only:  # external or hybrid load balancing: each API process has its own engines
        first, engines = int(parallel.data_parallel_rank), int(parallel.data_parallel_size_local)
    elif 0 < (local := int(parallel.data_parallel_size_local)) < engines:
        raise UserInputError(
            f"vllm-merge reaches the workers of its own machine only, but {engines - local} of {engines} engines are elsewhere "
            "(--data-parallel-size-local). Run an API server on every machine, with --data-parallel-hybrid-lb."
        )
    if int(parallel.nnodes) > 1:
        raise UserInputError(
            f"vllm-merge reaches the workers of its own machine only, but this server spreads over {parallel.nnodes} (--nnodes). "
            "Choose tensor and pipeline parallel sizes that fit into one machine."
        )
    return [Place(engine, rank) for engine in range(first, first + engines) for rank in range(int(parallel.world_size))]


def remove_dead(folder: Path) -> None:
    """Remove what workers that were killed left in a folder of sockets; vLLM kills those that do not end at once."""
    for path in folder.glob("worker-*-*.*"):
        if not _lives(path.with_suffix(".sock")):
            path.unlink(missing_ok=True)


def _lives(path: Path) -> bool:
    """Whether the process of a socket's name runs here, or anybody listens at it (in a container, say, with other numbers)."""
    with contextlib.suppress(ProcessLookupError, ValueError, OverflowError):
        os.kill(int(path.name.split("-")[1]), 0)
        return True
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


async def connect_workers(
    folder: Path,
    wanted: Collection[Place],
    on_event: Callable[[Message], None],
    *,
    timeout: float = FIND_SECONDS,
) -> list[WorkerLink]:
    """Connect to the wanted workers among those whose sockets are in `folder`; in the order of their places.

    Sockets of dead workers and workers of other engines are passed over. Raises ControlError that names who is missing.
    """
    deadline = asyncio.get_running_loop().time() + timeout
    found: dict[Place, WorkerLink] = {}
    others: set[Path] = set()
    while missing := set(wanted) - set(found):
        for path in sorted(folder.glob("worker-*.sock")):
            if path in others or any(link.path == path for link in found.values()):
                continue
            reached = await _reach(path, on_event)
            if reached is None:
                continue
            place, link = reached
            if place in missing and place not in found:
                found[place] = link
            else:
                others.add(path)
                await link.close()
        if set(wanted) <= set(found):
            break
        if asyncio.get_running_loop().time() > deadline:
            for link in found.values():
                await link.close()
            raise ControlError("disconnected", _missing(folder, sorted(missing - set(found)), len(wanted), timeout))
        await asyncio.sleep(0.1)
    return [found[place] for place in sorted(found)]


async def any_worker(folder: Path, *, timeout: float = FIND_SECONDS) -> Message:
    """The facts of any worker whose socket is in `folder`. Raises ControlError if there is none."""
    deadline = asyncio.get_running_loop().time() + timeout
    while True:
        for path in sorted(folder.glob("worker-*.sock")):
            reached = await _reach(path, lambda event: None)
            if reached is not None:
                await reached[1].close()
                return reached[1].facts
        if asyncio.get_running_loop().time() > deadline:
            raise ControlError("disconnected", _missing(folder, [Place(0, 0)], 1, timeout))
        await asyncio.sleep(0.1)


async def _reach(path: Path, on_event: Callable[[Message], None]) -> tuple[Place, WorkerLink] | None:
    link = WorkerLink(path, on_event)
    with contextlib.suppress(ConnectionError, FileNotFoundError, ControlError, TimeoutError):
        async with asyncio.timeout(HELLO_SECONDS):
            await link.connect()
            link.facts = await link.call("hello")
        return Place(int(link.facts["engine"]), int(link.facts["rank"])), link
    await link.close()
    return None


def _missing(folder: Path, missing: Iterable[Place], wanted: int, timeout: float) -> str:
    names = [str(place) for place in missing]
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return (
        f"{len(names)} of {wanted} vLLM workers did not open a socket in {folder} within {timeout:.0f} s: {shown}. Is the plugin "
        "loaded in the workers (VLLM_PLUGINS must name vllm_merge or be unset) and LoRA enabled (--enable-lora)? Workers on other "
        f"machines cannot be reached; those that were started by themselves on this one need the same {RUNTIME_DIR_VARIABLE} "
        f"(here {os.environ.get(RUNTIME_DIR_VARIABLE, 'unset')})."
    )
