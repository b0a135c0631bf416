# SPDX-License-Identifier: Apache-2.0
"""The names as vLLM's server sees them, and how they follow the recipe file and moved aliases while the server runs.

A change is read, planned and warmed beside what is served; only then every name moves, all at once, and in every API process
before it counts (owner.py). A file that is wrong, or gone, changes nothing and is said in the log and at /v1/merge/recipes.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

from vllm_merge.errors import MergeError, UserInputError
from vllm_merge.serving import compat
from vllm_merge.serving.control import ControlError, Message, WorkerLink
from vllm_merge.serving.front import FrontDoor
from vllm_merge.serving.names import Names
from vllm_merge.serving.shared import SharedState
from vllm_merge.serving.state import Stamp, State

logger = logging.getLogger("vllm_merge")

WATCH_SECONDS = 1.0


class Published:
    """What a server serves: its recipe file, and its names in vLLM's table of LoRA requests.

    owner: the line to the worker that keeps the state of all API processes.
    """

    def __init__(self, front: FrontDoor, serving_models: Any, config: Path, owner: WorkerLink) -> None:
        self._front = front
        self._models = serving_models
        self._config = config
        self._ours: set[str] = set()
        self._given: dict[str, Any] = {}  # name -> the LoRARequest that vLLM made for it
        self._shared = SharedState(owner, self._adopt)

    async def start(self) -> None:
        """Serve what other API processes serve already, or read the file; warm what is eager.

        Raises UserInputError if the file is wrong.
        """
        await self._shared.join()
        try:
            async with self._shared.turn() as found:
                if found is None:
                    stamp = _stamp(self._config)
                    await self._shared.propose(State(1, await self._read(), stamp))
        except ControlError as error:
            if self._shared.state is None:
                raise
            logger.warning("%s", error)  # this process has the state; another is slow to take it over
        compat.publish(self._models, self._front.listed, self._front.owns)
        await self._front.warm_eager(self.state.names)

    @property
    def state(self) -> State:
        """What this process serves."""
        state = self._shared.state
        assert state is not None, "start() comes first"
        return state

    def as_of(self, number: int) -> State:
        """What every API process serves, by the owner's number of it."""
        return self._shared.as_of(number) or self.state

    def on_event(self, event: Message) -> None:
        self._shared.on_event(event)

    async def watch(self) -> None:
        """Follow the file for as long as the server runs."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            try:
                await self._look()
            except ControlError as error:
                logger.warning("%s", error)
            except Exception:
                logger.exception("could not look at %s", self._config.name)

    async def _look(self) -> None:
        stamp = await asyncio.to_thread(_stamp, self._config)
        if stamp is None or stamp == self.state.stamp:
            return  # a file that is gone is not a wish to serve nothing
        async with self._shared.turn():
            stamp = await asyncio.to_thread(_stamp, self._config)
            if stamp is not None and stamp != self.state.stamp:  # else another process has read it meanwhile
                await self._reload(stamp)

    async def _reload(self, stamp: Stamp) -> None:
        """Serve what the file says now, or keep everything and remember why not."""
        before, name = self.state, self._config.name
        try:
            resolved = before.reread(await self._read(), stamp)
            await self._front.warm_eager(resolved.names)  # raises for one that must not fail
        except MergeError as error:
            logger.error("%s was changed and is wrong; what was served before stays:\n%s", name, error)
            await self._shared.propose(before.refused(str(error), stamp))
            return
        except Exception as error:
            logger.exception("%s was changed and could not be served", name)
            await self._shared.propose(before.refused(f"{type(error).__name__}: {error}", stamp))
            return
        await self._shared.propose(resolved)
        logger.info("%s was changed: generation %d is served", name, resolved.generation)

    async def move(self, alias: str, target: str) -> State:
        """Let an alias stand for another recipe or adapter; returns the state in which no API process answers as before.

        The target is made ready first. Raises UserInputError for a name that is none, ArtifactUnavailable for a target that
        cannot be made, ControlError if an API process does not answer.
        """
        async with self._shared.turn() as before:
            assert before is not None
            after = before.with_move(alias, target)
            found = self._front.find(target)
            assert found is not None, "a recipe or adapter of the state is known"
            await self._front.ready(found[0])
            if after is not before:
                await self._shared.propose(after)
                logger.info("alias %s was moved to %s: generation %d", alias, target, after.generation)
            return after

    async def _read(self) -> Names:
        resolved = await self._front.resolve(self._config, self._registered())
        bases = {path.name for path in self._models.base_model_paths}
        if taken := sorted(set(resolved.names) & bases):
            raise UserInputError(f"{self._config}: the name {taken[0]!r} is the served base model's; rename it here")
        return resolved

    def _registered(self) -> dict[str, str]:
        """{name: folder} of the adapters that vLLM was given: --lora-modules, /v1/load_lora_adapter, resolvers.

        Their names become ours too (our loader obeys patterns, vLLM 0.26's does not), so they are remembered until vLLM
        unloads them.
        """
        requests = self._models.lora_requests
        self._given |= {name: r for name, r in requests.items() if not self._front.owns(r.lora_path)}
        self._given = {name: request for name, request in self._given.items() if name in requests}
        return {name: request.lora_path for name, request in self._given.items()}

    def _adopt(self, state: State) -> None:
        self._registered()  # remembers what vLLM was given before its names become ours
        before = self._shared.state
        unloaded = self._ours - set(self._models.lora_requests)
        self._front.adopt(state.names)
        requests = self._front.lora_requests()
        if before is not None and before.stamp == state.stamp:  # the same reading: what vLLM unloaded since stays away
            requests = {name: request for name, request in requests.items() if name not in unloaded}
        self._models.lora_requests.update(requests)
        for name in self._ours - set(requests):
            if name in self._given:
                self._models.lora_requests[name] = self._given[name]
            else:
                self._models.lora_requests.pop(name, None)
        self._ours = set(requests)


def _stamp(path: Path) -> Stamp | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns
