# SPDX-License-Identifier: Apache-2.0
"""A whole server of the plugin in one process, with everything real but vLLM: routes, middleware, front door, control line,
worker, merges, cache and tiers. Its engine is played: it has two slots and answers with the hash of what is in the slot, so
that an answer says which weights gave it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import hashlib
import json
import os
import shutil
import tempfile
import time
import weakref
from argparse import Namespace
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import torch
import yaml
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from safetensors.torch import save_file

from vllm_merge.serving import compat
from vllm_merge.serving.control import front, links
from vllm_merge.serving.control.control import RUNTIME_DIR_VARIABLE
from vllm_merge.serving.control.front import Artifact, FrontDoor
from vllm_merge.serving.control.published import Published, stamp_of
from vllm_merge.serving.memory import sources
from vllm_merge.serving.memory.residency import ResidentArtifact
from vllm_merge.serving.plugin import CONFIG_VARIABLE, MergeEndpoints
from vllm_merge.serving.worker import placing, worker
from vllm_merge.serving.worker.worker import WorkerService

BASE = "the-base"
TOKEN = "an-admin-token"
ADMIN = {"x-vllm-merge-admin-token": TOKEN}
SLOTS = 2
REGISTERED = 3  # adapters that the played vLLM keeps registered
STEPS = 3  # tokens of an answer
NOTHING = "0" * 16  # the token of weights that change nothing
WAIT_SECONDS = 60


def write_adapter(folder: Path, seed: int, *, rank: int = 4, d_in: int = 48, d_out: int = 32) -> None:
    """A PEFT folder of two modules."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(2):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{name}.lora_A.weight"] = torch.randn(rank, d_in, generator=generator)
        tensors[f"{name}.lora_B.weight"] = torch.randn(d_out, rank, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors")


def recipe_file(folder: Path, adapters: int = 4, merges: int = 6, **more: Any) -> Path:
    """`recipes.yaml` beside adapters a0, a1, …; recipes m0, m1, …, each of two adapters; an alias `assistant` of m0."""
    for i in range(adapters):
        write_adapter(folder / f"a{i}", i)

    def merged(i: int) -> dict[str, Any]:
        names = (f"a{i % adapters}", f"a{(i + 1) % adapters}")
        weights = (1.0 + i / 10, 0.3)
        inputs = [{"adapter": n, "parameters": {"weight": w}} for n, w in zip(names, weights, strict=True)]
        return {"merge_method": "task_arithmetic", "adapters": inputs, "load": "lazy"}

    document = {
        "version": 1,
        "adapters": {f"a{i}": {"path": f"./a{i}"} for i in range(adapters)},
        "recipes": {f"m{i}": merged(i) for i in range(merges)},
        "aliases": {"assistant": "m0"},
        **more,
    }
    path = folder / "recipes.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def token_of(factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> str:
    digest = hashlib.sha256()
    for module in sorted(factors):
        for tensor in factors[module]:
            digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


class PlayedManager:
    """vLLM's side of one worker: what is registered, and what is in the slots."""

    def __init__(self) -> None:
        self.device = "cpu"
        self.registered: OrderedDict[int, Any] = OrderedDict()
        self.slots: list[tuple[int, str] | None] = [None] * SLOTS


class PlayedEngine:
    """An engine of one worker that keeps vLLM's promises: slots of running requests stay, the others go."""

    def __init__(self, manager: PlayedManager, service: WorkerService) -> None:
        self._service = service
        self.steps = asyncio.Event()
        self.steps.set()
        self._manager = manager
        self._running: dict[int, int] = {}  # lora id -> requests in a slot
        self._freed = asyncio.Condition()

    async def generate(self, prompt: str, *, lora_request: Any = None) -> AsyncIterator[str]:
        slot = await self._scheduled(lora_request)
        try:
            for _ in range(STEPS):
                await self.steps.wait()
                await asyncio.sleep(0)
                held = self._manager.slots[slot]
                assert held is not None
                assert held[0] == lora_request.lora_int_id, "vLLM keeps what runs in its slot"
                yield held[1]
        finally:
            async with self._freed:
                self._running[lora_request.lora_int_id] -= 1
                self._freed.notify_all()

    async def _scheduled(self, request: Any) -> int:
        number = request.lora_int_id
        async with self._freed:
            await self._freed.wait_for(lambda: self._free(number) is not None)
            slot = self._free(number)
            assert slot is not None
            self._running[number] = self._running.get(number, 0) + 1
            held = self._manager.slots[slot]
            if held is None or held[0] != number:
                self._manager.slots[slot] = (number, self._filled(request, slot))
            return slot

    def empty_slots(self) -> None:
        for slot, held in enumerate(self._manager.slots):
            if held is not None and not self._running.get(held[0]):
                self._manager.slots[slot] = None
                self._manager.registered.pop(held[0], None)

    def _free(self, number: int) -> int | None:
        """The slot that has it, or an empty one, or one whose requests have ended."""
        for wanted in (lambda held: held is not None and held[0] == number, lambda held: held is None):
            for slot, held in enumerate(self._manager.slots):
                if wanted(held):
                    return slot
        return next((s for s, held in enumerate(self._manager.slots) if held and not self._running.get(held[0])), None)

    def _filled(self, request: Any, slot: int) -> str:
        """What vLLM does inside of a step: register the adapter if it is not, and fill a slot with it."""
        service, known = self._service, self._manager.registered
        if request.lora_int_id not in known:
            while len(known) >= REGISTERED:
                free = next((number for number in known if not self._running.get(number)), None)
                if free is None:
                    break
                del known[free]
            known[request.lora_int_id] = service.load(request)
        known.move_to_end(request.lora_int_id)
        model = known[request.lora_int_id]
        if getattr(model, "zero", False):
            return NOTHING
        filled = service.fill(model, slot)
        return NOTHING if filled is None else token_of(filled.factors)


@dataclass
class PlayedApi:
    """One API process of a server."""

    app: FastAPI
    front: FrontDoor
    published: Published
    client: httpx.AsyncClient
    watching: list[asyncio.Future[None]]

    async def ask(self, model: str, **more: Any) -> httpx.Response:
        return await self.client.post("/v1/completions", json={"model": model, "prompt": "x", **more})

    async def admin(self, method: str, path: str, **body: Any) -> httpx.Response:
        return await self.client.request(method, f"/v1/merge/{path}", headers=ADMIN, json=body or None)

    async def look(self) -> None:
        """Read the recipe file, if it has changed, without waiting whether it rests."""
        await self.published._look(stamp_of(self.published._config))

    async def end(self) -> None:
        """Its connections close, and nothing that it held is given back by itself."""
        for task in self.watching:
            task.cancel()
        await asyncio.gather(*self.watching, return_exceptions=True)
        for link in self.front.links.all:
            link.on_lost = lambda: None
            await link.close()
        await self.client.aclose()


class PlayedServer:
    """ask() and admin() are a client's, of the first API process; the rest is for looking inside."""

    def __init__(self, config: Path, manager: PlayedManager, service: WorkerService) -> None:
        self.config, self.files = config, config.parent
        self.manager, self.service = manager, service
        self.engine = PlayedEngine(manager, service)
        self.apis: list[PlayedApi] = []
        self.made: weakref.WeakSet[ResidentArtifact] = weakref.WeakSet()

    async def add_api(self) -> PlayedApi:
        """Start an API process, as vLLM does."""
        parallel = SimpleNamespace(
            world_size=1, data_parallel_size=1, data_parallel_size_local=1, local_engines_only=False, nnodes=1
        )
        engine_client = SimpleNamespace(
            generate=self.engine.generate,
            vllm_config=SimpleNamespace(lora_config=SimpleNamespace(), parallel_config=parallel),
        )
        models = SimpleNamespace(lora_requests={}, base_model_paths=[SimpleNamespace(name=BASE)])
        endpoints = MergeEndpoints()
        app = _application(engine_client, models, endpoints)
        app.state.openai_serving_models, app.state.engine_client = models, engine_client
        await endpoints.init_state(engine_client, app.state, Namespace())
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        client = httpx.AsyncClient(transport=transport, base_url="http://server", timeout=WAIT_SECONDS)
        front_door, published = app.state.vllm_merge, app.state.vllm_merge_published
        self.apis.append(PlayedApi(app, front_door, published, client, endpoints._watching))
        return self.apis[-1]

    @property
    def front(self) -> FrontDoor:
        return self.apis[0].front

    @property
    def published(self) -> Published:
        return self.apis[0].published

    async def ask(self, model: str, **more: Any) -> httpx.Response:
        return await self.apis[0].ask(model, **more)

    async def admin(self, method: str, path: str, **body: Any) -> httpx.Response:
        return await self.apis[0].admin(method, path, **body)

    async def look(self) -> None:
        await self.apis[0].look()

    async def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + WAIT_SECONDS
        while not condition():
            assert time.monotonic() < deadline, "it never came so far"
            await asyncio.sleep(0.005)

    async def idle(self) -> None:
        """Until nothing is merged, leased or written any more."""
        await self.until(
            lambda: not self.service._making.jobs and not self._artifacts(lambda a: bool(a.users or a.leased))
        )
        await self.until(lambda: not any(self.service.store._leases.values()))
        # A queue's thread has told that it is done before the last thing it held is gone.
        await asyncio.wait_for(asyncio.to_thread(self.service._merging.after.submit(lambda: None).result), WAIT_SECONDS)
        await asyncio.wait_for(asyncio.to_thread(self.service._tiers.wait), WAIT_SECONDS)

    def _artifacts(self, wanted: Callable[[Artifact], bool]) -> list[Artifact]:
        return [artifact for api in self.apis for artifact in api.front.artifacts.values() if wanted(artifact)]

    def label(self, name: str) -> str:
        known = self.front.known(name)
        assert known is not None
        return known.label

    def empty_slots(self) -> None:
        """vLLM has to load and fill again what no running request has in a slot."""
        self.engine.empty_slots()

    async def break_line(self) -> None:
        """Every connection to the worker breaks; it may be made again at once."""
        await self.until(lambda: all(api.front.connected for api in self.apis))
        epochs = [api.front.links.epoch for api in self.apis]
        sessions = list(self.service._sessions)
        for session in sessions:
            self.service._server.loop.call_soon_threadsafe(session._writer.transport.abort)
        await self.until(lambda: all(api.front.links.epoch > e for api, e in zip(self.apis, epochs, strict=True)))


def leftovers(server: PlayedServer) -> dict[str, int]:
    """What must not grow from one fault to the next. Call it on an idle server."""
    gc.collect()  # quick: what was there before the server is frozen
    cache = server.service.store.describe()
    return {
        "artifacts in memory beside the cache's": len(server.made) - len(server.service.store._kept),
        "bytes that no artifact has": cache["bytes"] - sum(row["bytes"] for row in cache["artifacts"]),
        "tasks": len(asyncio.all_tasks()),
        "files and sockets": len(list(Path("/proc/self/fd").iterdir())),
        "merges": len(server.service._making.jobs),
        "sessions": len(server.service._sessions),
        "leases": sum(server.service.store._leases.values()),
        "writes that wait": len(server.service._tiers._waiting),
        "requests": sum(artifact.users for artifact in server._artifacts(lambda artifact: True)),
        "running": sum(server.engine._running.values()),
    }


def _vllm() -> dict[str, Callable[..., Any]]:
    """What the plugin asks of vLLM, by the names of compat."""
    return {
        "slot_dtype": lambda manager: torch.float32,
        "max_rank": lambda manager: 64,
        "zero_lora_model": lambda manager, number: SimpleNamespace(clone=lambda n: SimpleNamespace(id=n, zero=True)),
        "marker_lora_model": lambda manager, number: SimpleNamespace(id=number),
        "slot_buffers": lambda manager: None,
        "misfits": lambda manager, pairs: [],
        "registered_bytes": lambda manager: 0,
        "is_registered": lambda manager, number: number in manager.registered,
        "slot_ids": lambda manager: [held[0] if held else None for held in manager.slots],
        "mend_prompt_logprobs": lambda: None,
        "mend_rows_without_lora": lambda: False,
        "place": lambda config: {"engine": 0, "rank": 0, "workers": 1},
        "packed_lora_model": lambda manager, number, factors: SimpleNamespace(id=number, factors=dict(factors)),
        "lora_request": lambda name, number, path: SimpleNamespace(
            lora_name=name, lora_int_id=number, lora_path=path, name=name, path=path
        ),
        "publish": lambda models, requests, owns: None,
    }


@functools.cache
def _freeze() -> None:
    """Once: what exists before the first server is not looked through at every collection."""
    gc.collect()
    gc.freeze()


def _counted(made: weakref.WeakSet[ResidentArtifact]) -> type[ResidentArtifact]:
    """ResidentArtifact whose instances are all in `made` for as long as anything holds them."""

    class Counted(ResidentArtifact):
        def __init__(self, *arguments: Any, **more: Any) -> None:
            super().__init__(*arguments, **more)
            made.add(self)

    return Counted


@contextlib.contextmanager
def patched(place: Any, /, **changes: Any) -> Iterator[None]:
    """Set attributes, and set them back."""
    missing = object()
    before = {name: getattr(place, name, missing) for name in changes}
    for name, value in changes.items():
        setattr(place, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is missing:
                delattr(place, name)
            else:
                setattr(place, name, value)


@contextlib.contextmanager
def environment(**changes: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


SETTINGS = {"CACHE_BYTES": 1 << 20, "HOST_BYTES": 0, "SOURCE_BYTES": 1 << 20, "ADMIN_TOKEN": TOKEN}


@contextlib.asynccontextmanager
async def played_server(config: Path, *, apis: int = 1, **settings: Any) -> AsyncIterator[PlayedServer]:
    """A server of the recipe file; settings: the VLLM_MERGE_* variables without that prefix; None unsets one."""
    wanted = {**SETTINGS, **settings}
    variables = {f"VLLM_MERGE_{name}": str(value) for name, value in wanted.items() if value is not None}
    manager = PlayedManager()
    folder = Path(tempfile.mkdtemp(prefix="vm-"))  # a socket's path must be short
    vllm_config = SimpleNamespace(model_config=SimpleNamespace(model=BASE, revision=None))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        variables |= {CONFIG_VARIABLE: str(config), RUNTIME_DIR_VARIABLE: str(folder)}
        stack.enter_context(environment(**variables))
        stack.enter_context(patched(compat, **_vllm()))
        stack.enter_context(patched(worker, base_model_hash=lambda model: "b" * 64))
        stack.enter_context(patched(front, LINGER_SECONDS=0.02))
        stack.enter_context(patched(links, RECONNECT_SECONDS=0.02))
        stack.enter_context(patched(sources, REST_SECONDS=0.0))
        service = WorkerService(manager, vllm_config, folder / "worker-1.sock", None)
        service.start()
        stack.callback(service.stop)
        server = PlayedServer(config, manager, service)
        stack.enter_context(patched(placing, ResidentArtifact=_counted(server.made)))
        _freeze()
        for _ in range(apis):
            await server.add_api()
        yield server
        for api in server.apis:
            await api.end()


def _application(engine: Any, models: Any, endpoints: MergeEndpoints) -> FastAPI:
    app = FastAPI()

    @app.post("/v1/completions")
    async def completions(request: Request) -> JSONResponse:
        body = await request.json()
        name = body["model"]
        if name == BASE:
            return JSONResponse({"model": name, "tokens": [NOTHING] * STEPS})
        lora = models.lora_requests.get(name)
        if lora is None:
            return JSONResponse({"error": {"message": f"The model `{name}` does not exist."}}, 404)
        try:
            tokens = [token async for token in engine.generate(body["prompt"], lora_request=lora)]
        except Exception as error:
            return JSONResponse({"error": {"message": str(error)}}, 500)
        return JSONResponse({"model": lora.lora_name, "tokens": tokens})

    endpoints.attach_router(app)
    return app


def played(scenario: Callable[[PlayedServer], Any], config: Path, **settings: Any) -> Any:
    """Run an async scenario on a server of the recipe file."""

    async def run() -> Any:
        async with played_server(config, **settings) as server:
            return await asyncio.wait_for(scenario(server), 4 * WAIT_SECONDS)

    return asyncio.run(run())
