# SPDX-License-Identifier: Apache-2.0
"""The API process: leases around requests, application states, names in /v1/models."""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Any


def wrap_engine(
    engine_client: Any,
    lease: Callable[[Any], Any],
    counter: Callable[[], Callable[[Any], None] | None] = lambda: None,
) -> None:
    """Hold `lease(lora_request)` (an async context manager giving the request to use) around generate and encode.

    lease(request) is None for requests that are not ours; those go straight through. counter() gives what is to be called
    with every output, or None.
    """
    for name in ("generate", "encode"):
        original = getattr(engine_client, name, None)
        if original is not None and not getattr(original, "_vllm_merge", False):
            setattr(engine_client, name, _leased(original, lease, counter))


BARE_STATES = (
    ("vllm.entrypoints.launchers.api_server.app_state", "init_endpoint_plugins_state"),
    ("vllm.entrypoints.openai.api_server", "_init_endpoint_plugins_state"),  # 0.26
)


def wrap_bare_states(initialise: Callable[[Any, Any, Any], Awaitable[None]]) -> None:
    """Call `initialise(engine_client, state, args)` for application states that vLLM makes without endpoint plugins.

    So does its batch runner, which has requests and no HTTP. Only in processes that have imported what makes such states.
    """
    for place, name in BARE_STATES:
        module = sys.modules.get(place)
        original = getattr(module, name, None)
        if original is not None and not getattr(original, "_vllm_merge", False):
            setattr(module, name, _initialising(original, initialise))


def _initialising(original: Callable[..., Awaitable[None]], initialise: Callable[..., Awaitable[None]]) -> Any:
    @functools.wraps(original)
    async def init(engine_client: Any, state: Any, args: Any) -> None:
        await original(engine_client, state, args)
        if not hasattr(state, "endpoint_plugins"):
            await initialise(engine_client, state, args)

    init._vllm_merge = True  # type: ignore[attr-defined]
    return init


def _leased(
    original: Callable[..., AsyncGenerator[Any, None]],
    lease: Callable[[Any], Any],
    counter: Callable[[], Callable[[Any], None] | None],
) -> Callable[..., AsyncGenerator[Any, None]]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        bound = signature.bind(*args, **kwargs)
        held = lease(bound.arguments.get("lora_request"))
        count = counter()
        if held is not None:
            return run(bound, held, count)
        outputs = original(*args, **kwargs)
        return outputs if count is None else counted(outputs, count)

    async def run(
        bound: inspect.BoundArguments, held: Any, count: Callable[[Any], None] | None
    ) -> AsyncGenerator[Any, None]:
        async with held as holder:
            bound.arguments["lora_request"] = holder.lora_request
            # Closed here and now, so that a client that left aborts its request before the lease ends.
            async with contextlib.aclosing(original(*bound.args, **bound.kwargs)) as outputs:
                async for output in outputs:
                    await holder.check()
                    if count is not None:
                        count(output)
                    yield output

    async def counted(outputs: AsyncGenerator[Any, None], count: Callable[[Any], None]) -> AsyncGenerator[Any, None]:
        async with contextlib.aclosing(outputs):
            async for output in outputs:
                count(output)
                yield output

    call._vllm_merge = True  # type: ignore[attr-defined]
    return call


def lora_request(name: str, lora_id: int, path: str) -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest(lora_name=name, lora_int_id=lora_id, lora_path=path)


def publish(serving_models: Any, requests: Callable[[], Mapping[str, Any]], is_ours: Callable[[str], bool]) -> None:
    """List our names in /v1/models beside vLLM's: requests() gives {name: LoRARequest}; what is not ours stays as it is."""
    original = serving_models.show_available_models

    async def show_available_models() -> Any:
        models = await original()
        models.data = [card for card in models.data if not is_ours(str(card.root))]
        base = models.data[0]  # vLLM lists its base models first
        models.data += [
            type(base)(id=name, root=request.lora_name, parent=base.id, permission=[type(base.permission[0])()])
            for name, request in requests().items()
        ]
        return models

    serving_models.show_available_models = show_available_models


def lora_config(engine_client: Any) -> Any | None:
    return engine_client.vllm_config.lora_config


def parallel_config(engine_client: Any) -> Any:
    """How many engines and ranks this front end talks to: see workers.wanted_places."""
    return engine_client.vllm_config.parallel_config
