# SPDX-License-Identifier: Apache-2.0
"""The two entry points vLLM knows: `register` (every process) and `endpoint_plugin` (API processes).

Both are named `vllm_merge`, so one word in VLLM_PLUGINS names the whole plugin. Without VLLM_MERGE_CONFIG nothing is touched.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import secrets
import shutil
import sys
from argparse import Namespace
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_merge.errors import MergeError, UserInputError
from vllm_merge.serving.control.control import RUNTIME_DIR_VARIABLE, Message, runtime_dir

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.datastructures import State

logger = logging.getLogger("vllm_merge")

PLUGIN = "vllm_merge"
CONFIG_VARIABLE = "VLLM_MERGE_CONFIG"
PLUGINS_VARIABLE = "VLLM_PLUGINS"

# Groups that VLLM_PLUGINS restricts although they load by default; endpoint plugins load only if named.
_DEFAULT_GROUPS = (
    "vllm.general_plugins",
    "vllm.platform_plugins",
    "vllm.io_processor_plugins",
    "vllm.stat_logger_plugins",
)


def config_path() -> Path | None:
    value = os.environ.get(CONFIG_VARIABLE)
    return Path(value) if value else None


def extended_plugins(current: str | None) -> str:
    """VLLM_PLUGINS with ours in it and nothing lost: an unset list means every plugin, so every name is spelled out."""
    if current is None:
        names = sorted({entry.name for group in _DEFAULT_GROUPS for entry in entry_points(group=group)} | {PLUGIN})
    else:
        names = [name for name in current.split(",") if name]
        if PLUGIN not in names:
            names.append(PLUGIN)
    return ",".join(names)


def register() -> None:
    """vLLM's general plugin: called in the API server, the engine core and every worker, possibly more than once."""
    if config_path() is None:
        return
    _log_like_vllm()
    os.environ[PLUGINS_VARIABLE] = extended_plugins(os.environ.get(PLUGINS_VARIABLE))
    if RUNTIME_DIR_VARIABLE not in os.environ:
        folder, owner = runtime_dir(create=True), os.getpid()
        atexit.register(lambda: shutil.rmtree(str(folder), ignore_errors=True) if os.getpid() == owner else None)

    from vllm_merge.serving import compat, ground

    # Before vLLM binds the worker's threads to cores, which a merge need not share.
    affinity = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    services: dict[int, Any] = {}

    def on_manager(worker_manager: Any, vllm_config: Any) -> None:
        from vllm_merge.serving.control.workers import remove_dead
        from vllm_merge.serving.worker.sleep import outside_memory_pools
        from vllm_merge.serving.worker.worker import WorkerService

        folder = runtime_dir(create=True)
        assert folder is not None
        remove_dead(folder)
        path = folder / f"worker-{os.getpid()}-{secrets.token_hex(3)}.sock"
        ground.check_ground("worker")
        service = outside_memory_pools(
            compat.device(worker_manager), lambda: WorkerService(worker_manager, vllm_config, path, affinity)
        )
        compat.wrap_sleep(service.fall_asleep, service.wake_up)
        service.start()
        services[id(worker_manager)] = service
        atexit.register(service.stop)

    def load(worker_manager: Any, lora_request: Any) -> Any | None:
        service = services.get(id(worker_manager))
        return service.load(lora_request) if service is not None else None

    def fill(lora_model: Any, slot: int) -> Any | None:
        service = getattr(lora_model, "vllm_merge_service", None)
        return service.fill(lora_model, slot) if service is not None else None

    ground.check_ground("load")
    compat.wrap_worker(on_manager, load)
    compat.wrap_activation(fill)
    compat.wrap_bare_states(MergeEndpoints().init_state)


def _log_like_vllm() -> None:
    """Give our loggers vLLM's handler and format, if vLLM configured its own."""
    ours, theirs = logging.getLogger("vllm_merge"), logging.getLogger("vllm")
    if theirs.handlers and not ours.handlers:
        ours.handlers, ours.propagate = list(theirs.handlers), False
        ours.setLevel(theirs.level)


class MergeEndpoints:
    """vLLM's endpoint plugin: our middleware and routes, and the names once the engine runs."""

    name = PLUGIN
    required_tasks = None

    def attach_router(self, app: FastAPI) -> None:
        if config_path() is None:
            return
        from vllm_merge.serving.page.routes import router as page
        from vllm_merge.serving.requests.middleware import MergeMiddleware
        from vllm_merge.serving.routes import (
            adapter_routes,
            aliases,
            artifact_routes,
            event_routes,
            recipe_changes,
            routes,
        )
        from vllm_merge.serving.routes.experiment_routes import changes as experiment_changes
        from vllm_merge.serving.routes.experiment_routes import router as experiments
        from vllm_merge.serving.routes.outcomes import router as outcomes
        from vllm_merge.serving.routes.route_errors import answer_errors
        from vllm_merge.serving.settings import admin_token
        from vllm_merge.serving.telemetry.metrics_scrape import ScrapeMiddleware
        from vllm_merge.serving.telemetry.tracing import TraceContextMiddleware

        app.add_middleware(MergeMiddleware)  # added before vLLM's own, so inside its API-key check
        app.add_middleware(TraceContextMiddleware)
        app.add_middleware(ScrapeMiddleware)
        answer_errors(app)
        for part in (routes, artifact_routes, aliases, adapter_routes, event_routes):
            app.include_router(part.router)
        app.include_router(experiments)
        app.include_router(outcomes)
        app.include_router(page)
        if admin_token() is not None:
            for admin in (artifact_routes, aliases, adapter_routes, recipe_changes):
                app.include_router(admin.admin_router)
            app.include_router(experiment_changes)

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        """Runs before the server listens: when /health answers, every eager recipe is ready."""
        config = config_path()
        if config is None or engine_client is None:
            return
        from vllm_merge.serving import compat, ground
        from vllm_merge.serving.control.accompany import Companions
        from vllm_merge.serving.control.front import FrontDoor
        from vllm_merge.serving.control.published import Published
        from vllm_merge.serving.control.workers import connect_workers, wanted_places
        from vllm_merge.serving.experiments.experiment_watch import begin as begin_experiments
        from vllm_merge.serving.experiments.experiment_watch import watch as watch_experiments
        from vllm_merge.serving.requests import outcome
        from vllm_merge.serving.requests.replies import told
        from vllm_merge.serving.telemetry.metrics_scrape import observe

        ground.check_ground("api")
        if compat.lora_config(engine_client) is None:
            raise UserInputError("vllm-merge serves LoRA adapters, but LoRA is off: start vLLM with --enable-lora.")
        folder = runtime_dir()
        assert folder is not None
        front: FrontDoor
        published: Published
        companions: Companions | None = None

        def on_event(event: Message) -> None:
            front.on_event(event)
            published.on_event(event)
            if companions is not None:
                companions.on_event(event)

        try:
            links = await connect_workers(folder, wanted_places(compat.parallel_config(engine_client)), on_event)
            front = FrontDoor(links)
            published = Published(front, state.openai_serving_models, config, links[0])
            compat.wrap_engine(engine_client, lambda request: told(front.lease(request)), outcome.counter)
            state.vllm_merge, state.vllm_merge_published = front, published
            begin_experiments(state, published)
            await published.start()
            state.vllm_merge_metrics = observe(front, published)
            companions = Companions(state, front, published)
        except MergeError as error:
            print(f"vllm-merge: {error}", file=sys.stderr)
            raise
        shadows = published.experiments.shadows
        ours = (published.watch(), watch_experiments(published), shadows.watch())
        watches = [*ours, *(watch() for watch in companions.watches())]
        self._watching = [asyncio.ensure_future(watch) for watch in watches]


def endpoint_plugin() -> MergeEndpoints:
    return MergeEndpoints()
