# SPDX-License-Identifier: Apache-2.0
"""Factors from anywhere as an artifact in a worker's cache, where they fit its slots and its budget."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from vllm_merge.errors import MergeError
from vllm_merge.recipe.plan import Plan
from vllm_merge.serving import compat
from vllm_merge.serving.memory.arena import Arena
from vllm_merge.serving.memory.residency import ArtifactStore, OutOfBudget, ResidentArtifact
from vllm_merge.serving.memory.slots import SlotLayout, flat_copy

SHAPES_KEPT = 32
ROOM_SECONDS = 10.0  # how long an artifact waits for a cache that is full of what requests hold
ROOM_LOOK_SECONDS = 0.05


class Placing:
    """wanted(digest): whether somebody still waits for an artifact, and the device may be worked on."""

    def __init__(
        self,
        manager: Any,
        device: torch.device,
        store: ArtifactStore,
        arena: Arena,
        layout: SlotLayout | None,
        wanted: Callable[[str], bool],
    ) -> None:
        self._manager, self._device, self._dtype = manager, device, compat.slot_dtype(manager)
        self._store, self._arena, self._layout, self._wanted = store, arena, layout, wanted
        self._fitting: set[tuple[Any, ...]] = set()  # modules and shapes of what was found to fit

    def place(
        self,
        plan: Plan,
        pairs: Mapping[str, tuple[Tensor, Tensor]],
        tensors_sha256: str | None,
        seconds: float,
        origin: str,
        embeddings: frozenset[str],
    ) -> ResidentArtifact:
        """Factors on any device as an artifact on the worker's. Raises MergeError for what fits no slot, OutOfBudget."""
        self._arena.rest()
        shapes = tuple((module, a.shape, b.shape) for module, (a, b) in pairs.items())
        if shapes not in self._fitting:
            if reasons := compat.misfits(self._manager, pairs):
                more = f" (and {len(reasons) - 3} more)" if len(reasons) > 3 else ""
                raise MergeError(f"{plan.artifact_name} does not fit this server: " + " ".join(reasons[:3]) + more)
            self._fitting = {shapes, *list(self._fitting)[: SHAPES_KEPT - 1]}
        size = sum(tensor.numel() for pair in pairs.values() for tensor in pair) * self._dtype.itemsize
        self._make_room(plan, size)
        self._arena.rest()
        storage, factors = flat_copy(pairs, self._device, self._dtype)
        self._arena.rest()
        source = None
        if self._layout is not None:
            views = compat.slot_views(self._manager, self._layout.buffers, factors)
            self._arena.rest()
            source = self._layout.source(views) if views is not None else None
            self._arena.rest()
        return ResidentArtifact(
            plan.digest,
            plan.artifact_name,
            storage,
            factors,
            source,
            tensors_sha256,
            seconds,
            origin,
            embeddings=embeddings,
        )

    def _make_room(self, plan: Plan, size: int) -> None:
        """What requests hold, and hold a little longer than they run, is waited for a while. Raises what `store.make_room` does."""
        deadline = time.monotonic() + ROOM_SECONDS
        while True:
            try:
                return self._store.make_room(plan.artifact_name, size)
            except OutOfBudget:
                if not self._wanted(plan.digest) or time.monotonic() > deadline:
                    raise
            time.sleep(ROOM_LOOK_SECONDS)
