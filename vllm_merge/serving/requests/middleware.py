# SPDX-License-Identifier: Apache-2.0
"""What happens to a request for one of our names before vLLM sees it: it waits until its artifact is ready.

The name is replaced by the artifact's own (so that an alias that moves meanwhile cannot change what this request gets), the
artifact is leased until the answer is sent, and the answer says in its headers which artifact gave it. Requests for other
models pass through untouched. vLLM's API-key check stands outside of this, so nobody without a key starts a merge.
"""

from __future__ import annotations

import time
from contextlib import AsyncExitStack, nullcontext
from functools import partial

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from vllm_merge.serving.control.front import ArtifactUnavailable, FrontDoor
from vllm_merge.serving.experiments.experiments import Experiments
from vllm_merge.serving.requests import adhoc, outcome
from vllm_merge.serving.requests.answers import AnswerFacts, Observed
from vllm_merge.serving.requests.bodies import Asked, read_body
from vllm_merge.serving.requests.misses import hold
from vllm_merge.serving.requests.refusals import Refused
from vllm_merge.serving.requests.replies import Reply
from vllm_merge.serving.requests.unknown import UnknownName

# What vLLM's API-key check covers in every version. Elsewhere (/pooling, /score, …) nothing of ours happens before vLLM has
# let the request through: it reaches its artifact through the engine client, waits there, and is answered alike.
_GUARDED = ("/v1/", "/v2/", "/inference/")
# Routes under these that take a model name but run nothing.
_NO_ENGINE = ("/v1/merge/", "/v1/load_lora_adapter", "/v1/unload_lora_adapter")


def _names(front: FrontDoor) -> list[str]:
    """What is served, adapters last."""
    return sorted(front.names, key=lambda name: front.names[name].kind == "adapter")


class MergeMiddleware:
    """Pure ASGI. `app.state.vllm_merge` holds the FrontDoor once the server's state is set up."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self._app(scope, receive, send)
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        front: FrontDoor | None = getattr(scope["app"].state, "vllm_merge", None)
        of_json = "json" in Headers(scope=scope).get("content-type", "json")
        if front is None or not of_json or path.startswith(_NO_ENGINE):
            return await self._app(scope, receive, send)
        body = await read_body(receive)
        if body is None:
            return None
        asked = Asked(scope, receive, body)
        guarded = path.startswith(_GUARDED)
        if (refused := await adhoc.admit(scope["app"].state, asked, guarded=guarded)) is not None:
            return await refused.response(asked.scope, asked.receive, send)
        experiments: Experiments | None = getattr(scope["app"].state, "vllm_merge_experiments", None)
        with experiments.shadows.client() if experiments is not None else nullcontext():
            return await self._run(front, experiments, asked, path, send)

    async def _run(
        self, front: FrontDoor, experiments: Experiments | None, asked: Asked, path: str, send: Send
    ) -> None:
        name = asked.model
        known = front.known(name) if name is not None else None
        if name is None or known is None:
            if name is not None and path.startswith(_GUARDED):  # elsewhere who asks may have no key
                send = UnknownName(name, partial(_names, front), send).send
            return await self._app(asked.scope, asked.receive, send)
        facts = AnswerFacts(name, known.kind, "", known.name, "", time.monotonic(), time.time())
        try:
            chosen = experiments.choose(asked) if experiments is not None else None
        except Refused as error:
            return await error.response(asked.scope, asked.receive, send)
        result = outcome.begin(name)
        compared = chosen and experiments and experiments.shadows.sample(self._app, asked, path, chosen)
        if compared:
            result.tape = compared.tape
        observed = Observed(facts, send)
        try:
            reply = Reply(asked, facts, result, observed.send)
            if chosen is not None:
                reply.choose(chosen)
            if path.startswith(_GUARDED) and not (chosen is not None and chosen.serve is None):
                await self._answer(front, asked, reply)
            else:
                if chosen is not None:
                    asked.rename(chosen.artifact)
                await self._app(asked.scope, asked.receive, reply.send)
        except Exception as error:  # the framework answers it outside of this
            if not isinstance(error, ClientDisconnect):
                facts.error = facts.error or "exception"
            raise
        finally:
            facts.route = getattr(asked.scope.get("route"), "path", "")  # the router has put it there
            observed.end(result)
            if experiments is not None and chosen is not None:
                experiments.record(facts, chosen)
                if compared:
                    experiments.shadows.follow(compared, facts)

    async def _answer(self, front: FrontDoor, asked: Asked, reply: Reply) -> None:
        """Lease what answers, and let vLLM answer with it."""
        chosen = reply.facts.chosen
        name = chosen.serve if chosen is not None and chosen.serve is not None else reply.facts.name
        models = asked.scope["app"].state.openai_serving_models
        async with AsyncExitStack() as leases:
            while True:
                known, current = front.known(name), models.lora_requests.get(name)
                unloaded = current is None or not front.owns(current.lora_path)  # or vLLM's own again
                if known is None or (known.digest is not None and unloaded):
                    return await self._app(asked.scope, asked.receive, reply.send)
                try:
                    base = models.base_model_paths[0].name
                    served = await hold(front, name, base, leases, always_wait=chosen is not None)
                except ArtifactUnavailable as error:
                    return await reply.unavailable(error)
                if served.instead_of or served.label in models.lora_requests:
                    break  # else the recipe file has changed while this request waited
                await leases.aclose()
            reply.use(served)
            asked.rename(served.label)
            return await self._app(asked.scope, asked.receive, reply.send)
