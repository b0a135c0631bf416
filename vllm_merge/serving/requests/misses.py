# SPDX-License-Identifier: Apache-2.0
"""Who answers a request for a name of ours: its artifact, or where that is not in memory what the recipe's `on_miss` says."""

from __future__ import annotations

from contextlib import AsyncExitStack
from dataclasses import dataclass

from vllm_merge.recipe.schema import BASE
from vllm_merge.serving.control.front import ArtifactUnavailable, FrontDoor
from vllm_merge.serving.control.names import Name


@dataclass(frozen=True)
class Served:
    """label: the model name that vLLM is to answer for. instead_of: the artifact that it stands in for, if it does."""

    label: str
    instead_of: str | None = None


async def hold(front: FrontDoor, name: str, base: str, leases: AsyncExitStack, *, always_wait: bool = False) -> Served:
    """Lease in `leases` whatever answers for `name`, a name of ours. base: what the base model is called here. always_wait:
    whatever the recipe says: no other may stand in for an arm of an experiment.

    A stand-in answers at once or not at all: one that is not in memory either is warmed, and the request is rejected.
    Raises ArtifactUnavailable.
    """
    known = front.known(name)
    assert known is not None
    try:
        return await _lease(front, known, always_wait or known.on_miss == "wait", leases)
    except ArtifactUnavailable:
        if always_wait or known.on_miss != "fallback" or known.fallback is None:
            raise
    stand_in = front.names.get(known.fallback)
    wanted = known.label or known.name
    if stand_in is None:  # the base model, or an adapter that vLLM serves by itself
        return Served(base if known.fallback == BASE else known.fallback, wanted)
    return Served((await _lease(front, stand_in, False, leases)).label, wanted)


async def _lease(front: FrontDoor, known: Name, wait: bool, leases: AsyncExitStack) -> Served:
    if known.digest is None:
        raise ArtifactUnavailable(known.reason, retry=False)
    await leases.enter_async_context(front.hold(front.artifacts[known.digest], known.label, wait=wait))
    return Served(known.label)
