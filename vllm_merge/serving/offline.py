# SPDX-License-Identifier: Apache-2.0
"""Merged adapters for vLLM's offline `LLM` class.

os.environ["VLLM_MERGE_CONFIG"] = "demo.yaml"              # before the LLM is made
llm = LLM("model", enable_lora=True, max_lora_rank=64)
llm.generate(prompts, lora_request=merge_request("support"))
"""

from __future__ import annotations

import asyncio
import atexit
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

from vllm_merge.errors import UserInputError
from vllm_merge.serving.control.control import runtime_dir
from vllm_merge.serving.control.front import FrontDoor
from vllm_merge.serving.control.workers import Place, any_worker, connect_workers
from vllm_merge.serving.plugin import CONFIG_VARIABLE, config_path

T = TypeVar("T")


class OfflineMerges:
    """A FrontDoor on an event loop of its own, for a program without one."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="vllm-merge-offline", daemon=True).start()
        atexit.register(self._loop.call_soon_threadsafe, self._loop.stop)
        self._front: FrontDoor | None = None
        self._held: dict[str, Any] = {}

    def request(self, name: str) -> Any:
        return self._run(self._request(name))

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _request(self, name: str) -> Any:
        front = self._front if self._front is not None and self._front.connected else await self._connect()
        found = front.find(name)
        if found is None:
            raise UserInputError(
                f"{config_path()} has no recipe, alias or adapter {name!r}; it has {', '.join(sorted(front.names))}"
            )
        artifact, label = found
        if artifact.plan.digest not in self._held or not artifact.leased:
            lease = front.lease(artifact.lora_request(label))
            assert lease is not None
            await lease.__aenter__()
            # Held until the program ends: nobody tells us when its requests are done.
            self._held[artifact.plan.digest] = lease
        return artifact.lora_request(label)

    async def _connect(self) -> FrontDoor:
        config, folder = config_path(), runtime_dir()
        if config is None or folder is None:
            raise UserInputError(
                f"set {CONFIG_VARIABLE} to your recipe file before you create the LLM, and create the LLM (with enable_lora=True) "
                "before you ask for a merge: the plugin then runs in its workers."
            )
        self._held.clear()
        front: FrontDoor
        facts = await any_worker(folder)
        wanted = [Place(facts["engine"], rank) for rank in range(facts["workers"])]
        links = await connect_workers(folder, wanted, lambda event: front.on_event(event))
        front = FrontDoor(links)
        await front.load(config)
        self._front = front
        return front


_merges: OfflineMerges | None = None
_lock = threading.Lock()


def merge_request(name: str) -> Any:
    """The LoRARequest of a recipe, alias or adapter of the recipe file, merged in the workers and ready to use.

    For programs that use vLLM's `LLM` class. The artifact stays in memory until the program ends. Raises UserInputError for
    an unknown name or a missing set-up, ArtifactUnavailable with the reason if the merge failed.
    """
    global _merges
    with _lock:
        if _merges is None:
            _merges = OfflineMerges()
        return _merges.request(name)
