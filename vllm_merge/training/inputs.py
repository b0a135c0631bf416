# SPDX-License-Identifier: Apache-2.0
"""What goes into the linear layers of a model when it reads some texts: their moments, gathered batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vllm_merge.errors import MergeError, UserInputError
from vllm_merge.recipe.problems import listed
from vllm_merge.training.osrm import Moments

BATCH = 8  # texts at once
ALL_LINEAR = "all-linear"
MOMENT_BYTES = 4 << 30

Batch = Mapping[str, Tensor]
"""input_ids and attention_mask, (texts, tokens) each, on the model's device."""


def target_layers(model: nn.Module, targets: Collection[str]) -> dict[str, nn.Linear]:
    """The linear layers whose name is one of `targets` or ends with a dot and it; `all-linear`: all but the head.

    Raises UserInputError for a target without any, with the endings that there are.
    """
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    linear = {name: module for name, module in linear.items() if module is not head}
    found: dict[str, nn.Linear] = {}
    for target in targets:
        mine = {
            name: module
            for name, module in linear.items()
            if target == ALL_LINEAR or name == target or name.endswith(f".{target}")
        }
        if not mine:
            endings = sorted({name.rpartition(".")[2] for name in linear})
            raise UserInputError(
                f"--target-modules {target}: the model has no linear layer of that name; it has {listed(endings)}, "
                f"and {ALL_LINEAR} means all of them"
            )
        found |= mine
    return {name: module for name, module in linear.items() if name in found}


def input_moments(
    model: nn.Module,
    layers: Mapping[str, nn.Linear],
    tasks: Mapping[str, Sequence[Batch]],
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
    moment_bytes: int = MOMENT_BYTES,
) -> Iterator[tuple[list[str], dict[str, Moments]]]:
    """For layers that get the same input (queries, keys and values do): their names, and the moments by task.

    The model reads every batch as often as it takes to keep the moments that are held at once under `moment_bytes`
    (those of one layer always are). Padding is not counted. progress(batches read, batches to read).
    Raises MergeError where a layer does not get one vector for each token.
    """
    parts = _parts(layers, len(tasks), moment_bytes)
    done, total = 0, len(parts) * sum(len(batches) for batches in tasks.values())
    for part in parts:
        found: dict[str, dict[str, Moments]] = {}
        leaders: dict[str, str] = {}
        for task, batches in tasks.items():
            reading = _Reading({name: layers[name] for name in part}, leaders)
            with reading.hooked(), torch.inference_mode():
                for batch in batches:
                    reading.read(model, batch)
                    done += 1
                    progress(done, total)
            for name, moments in reading.moments.items():
                found.setdefault(name, {})[task] = moments
        for name in part:
            if name not in leaders or len(found[leaders[name]]) < len(tasks):
                raise UserInputError(
                    f"--target-modules: {name} is not used by every task when the model reads its texts; leave it out"
                )
        for name, by_task in found.items():
            yield [other for other in part if leaders[other] == name], by_task


def _parts(layers: Mapping[str, nn.Linear], tasks: int, limit: int) -> list[list[str]]:
    """The layers in order, cut so that the moments of each part stay under the limit."""
    parts: list[list[str]] = []
    held = limit + 1
    for name, layer in layers.items():
        size = 8 * tasks * layer.in_features**2
        if held + size > limit:
            parts.append([])
            held = 0
        parts[-1].append(name)
        held += size
    return parts


class _Reading:
    """One task's texts going through the model. leaders: of each layer the first one that gets the same input."""

    def __init__(self, layers: Mapping[str, nn.Linear], leaders: dict[str, str]) -> None:
        self._layers, self._leaders = layers, leaders
        self.moments: dict[str, Moments] = {}
        self._inputs: dict[int, tuple[Tensor, str]] = {}  # of this batch, held so that no id is given twice
        self._real: Tensor | None = None

    def read(self, model: nn.Module, batch: Batch) -> None:
        self._real = batch["attention_mask"].bool()
        model(**batch, use_cache=False)
        self._inputs.clear()

    @contextmanager
    def hooked(self) -> Iterator[None]:
        handles = [layer.register_forward_pre_hook(self._hook(name)) for name, layer in self._layers.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def count(layer: nn.Module, arguments: tuple[Any, ...]) -> None:
            rows = arguments[0]
            if id(rows) in self._inputs:
                leader = self._inputs[id(rows)][1]
                if self._leaders.setdefault(name, leader) == leader:
                    return
            self._inputs[id(rows)] = rows, name
            assert self._real is not None
            if self._leaders.setdefault(name, name) != name:
                raise MergeError(f"{name} shares the input of {self._leaders[name]} in one batch and not in another")
            if rows.shape[:-1] != self._real.shape:
                raise MergeError(f"{name} gets inputs of shape {tuple(rows.shape)}, not one vector for each token")
            if name not in self.moments:
                self.moments[name] = Moments.zero(rows.shape[-1], rows.device)
            self.moments[name].add(rows[self._real])

        return count
