# SPDX-License-Identifier: Apache-2.0
"""The names as vLLM's server sees them, and how they follow the recipe file while the server runs.

A change of the file is read, planned and warmed beside what is served; only then every name moves, all at once. A file that
is wrong, or gone, changes nothing and is said in the log and at /v1/merge/recipes.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

from vllm_merge.errors import MergeError, UserInputError
from vllm_merge.serving import compat
from vllm_merge.serving.front import FrontDoor
from vllm_merge.serving.names import Names

logger = logging.getLogger("vllm_merge")

WATCH_SECONDS = 1.0

Stamp = tuple[int, int, int]


class Published:
    """The recipe file of a server, and its names in vLLM's table of LoRA requests."""

    def __init__(self, front: FrontDoor, serving_models: Any, config: Path) -> None:
        self._front = front
        self._models = serving_models
        self._config = config
        self._ours: set[str] = set()
        self._given: dict[str, Any] = {}  # name -> the LoRARequest that vLLM made for it
        self._stamp = _stamp(config)
        self.generation = 0
        self.error: str | None = None

    async def start(self) -> None:
        """Read the file, serve its names, warm what is eager. Raises UserInputError if the file is wrong."""
        resolved = await self._read()
        self._adopt(resolved)
        compat.publish(self._models, self._front.listed, self._front.owns)
        await self._front.warm_eager(resolved)

    async def watch(self) -> None:
        """Follow the file for as long as the server runs."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            stamp = await asyncio.to_thread(_stamp, self._config)
            if stamp is None or stamp == self._stamp:
                continue  # a file that is gone is not a wish to serve nothing
            self._stamp = stamp
            try:
                await self.reload()
            except Exception as error:
                self.error = f"{type(error).__name__}: {error}"
                logger.exception("%s was changed and could not be served", self._config.name)

    async def reload(self) -> None:
        """Serve what the file says now, or keep everything and remember why not."""
        try:
            resolved = await self._read()
        except MergeError as error:
            self.error = str(error)
            logger.error("%s was changed and is wrong; what was served before stays:\n%s", self._config.name, error)
            return
        await self._front.warm_eager(resolved)
        self._adopt(resolved)
        logger.info("%s was changed: generation %d is served", self._config.name, self.generation)

    def describe(self) -> dict[str, Any]:
        return {"generation": self.generation, "error": self.error}

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

    def _adopt(self, resolved: Names) -> None:
        self._front.adopt(resolved)
        requests = self._front.lora_requests()
        self._models.lora_requests.update(requests)
        for name in self._ours - set(requests):
            if name in self._given:
                self._models.lora_requests[name] = self._given[name]
            else:
                self._models.lora_requests.pop(name, None)
        self._ours = set(requests)
        self.generation, self.error = self.generation + 1, None


def _stamp(path: Path) -> Stamp | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns
