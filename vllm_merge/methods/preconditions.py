# SPDX-License-Identifier: Apache-2.0
"""The registry of preconditions: what may be done to the adapters, in order, before a merge method sees them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from vllm_merge.adapters.factors import Adapter, LoraFactors
from vllm_merge.adapters.held import HeldStacks
from vllm_merge.adapters.stacking import ModuleGroup, Stack, group_modules, stack_group
from vllm_merge.algebra.masks import mask_identity
from vllm_merge.errors import UserInputError
from vllm_merge.methods.parameters import ParameterSpec, parameter_specs, suggestion
from vllm_merge.methods.registry import default_registry, registered_preconditions


@dataclass(frozen=True, slots=True)
class Context:
    """Where a merge works, its seed, and how many bytes may be held beside inputs and result."""

    device: torch.device
    seed: int
    workspace_bytes: int


Change = Callable[..., Sequence[Mapping[str, LoraFactors]]]
Precondition = Callable[[Sequence[Adapter], Context], Sequence[Adapter]]
F = TypeVar("F", bound=Change)


@dataclass(frozen=True, slots=True)
class PreconditionSpec:
    """What a precondition is: change(adapters, context, **parameters) → the factors of every adapter."""

    name: str
    change: Change
    parameters: tuple[ParameterSpec, ...]
    version: int = 1

    def complete(self, given: Mapping[str, object]) -> dict[str, Any]:
        """All parameters: the given ones as typed values, and defaults. Raises UserInputError."""
        known = {spec.name: spec for spec in self.parameters}
        owner = f"precondition '{self.name}'"
        for name in given:
            if name not in known:
                raise UserInputError(
                    f"{owner} has no parameter '{name}'{suggestion(name, list(known))} "
                    f"(its parameters: {', '.join(known) or 'none'})"
                )
        typed = {name: known[name].validate(owner, value) for name, value in given.items()}
        return {name: typed.get(name, spec.default) for name, spec in known.items()}

    def __call__(
        self, adapters: Sequence[Adapter], context: Context, parameters: Mapping[str, object]
    ) -> list[Adapter]:
        """The changed adapters, in order. Each keeps an identity that is made of its own and of what was done.

        So that masks drawn later are the same wherever the change was computed, and others than those drawn here.
        """
        changed = self.change(adapters, context, **parameters)
        done = json.dumps([self.name, dict(parameters)], sort_keys=True)
        return [
            Adapter(
                adapter.name,
                factors,
                content_hash=hashlib.sha256(f"{mask_identity(adapter)}\0{done}".encode()).hexdigest(),
                base_model=adapter.base_model,
                metadata=adapter.metadata,
            )
            for adapter, factors in zip(adapters, changed, strict=True)
        ]


def precondition(name: str, *, version: int = 1) -> Callable[[F], F]:
    """Register a function `f(adapters, context, *, parameters…)`, which gives the factors of every adapter.

    version goes into the identity of results: raise it when the numbers change.
    """

    def register(function: F) -> F:
        if name in registered_preconditions:
            raise ValueError(f"precondition '{name}' is registered twice")
        registered_preconditions[name] = PreconditionSpec(name, function, parameter_specs(function), version)
        return function

    return register


def precondition_names() -> list[str]:
    """The names a recipe may list, sorted."""
    return default_registry().precondition_names()


def resolve_preconditions(requested: Sequence[str | Mapping[str, object] | Precondition]) -> list[Precondition]:
    """The functions of the requested preconditions, each a name, {name: parameters}, or such a function itself.

    Raises UserInputError for a name or parameter that is not known, a value that is not allowed, or an entry of another
    form.
    """
    registry = default_registry()
    functions: list[Precondition] = []
    for entry in requested:
        if callable(entry):
            functions.append(entry)
            continue
        named: Mapping[str, object] = {entry: {}} if isinstance(entry, str) else entry
        if len(named) != 1:
            raise UserInputError(f"a precondition is a name or {{name: parameters}}; found {entry!r}")
        ((name, parameters),) = named.items()
        spec = registry.precondition(name)
        if not isinstance(parameters, Mapping):
            raise UserInputError(f"precondition '{name}': its parameters must be a mapping; found {parameters!r}")
        functions.append(_bound(spec, spec.complete(parameters)))
    return functions


def _bound(spec: PreconditionSpec, parameters: Mapping[str, object]) -> Precondition:
    return lambda adapters, context: spec(adapters, context, parameters)


_ARRAYS = 8  # float64 arrays of a stack's size alive at once


def change_stacks(
    adapters: Sequence[Adapter],
    context: Context,
    change: Callable[[Stack], tuple[Tensor, Tensor]],
    arrays: int = _ARRAYS,
) -> list[Mapping[str, LoraFactors]]:
    """Run `change` over all modules in batches: a Stack to new A (modules, K, d_in) and B (modules, d_out, K).

    Gives the factors of every adapter, float32 on the context's device, with scaling 1, as views of stacks. arrays: how many float64 arrays
    of a stack's size `change` holds at once.
    """
    changed = [
        in_float32(stack.group, *change(stack))
        for group in group_modules(adapters)
        for stack in stacks(group, adapters, context, arrays)
    ]
    return held_factors(changed, len(adapters))


def stacks(group: ModuleGroup, adapters: Sequence[Adapter], context: Context, arrays: int = _ARRAYS) -> Iterator[Stack]:
    """The group's stacks, as many modules at once as leave room for `arrays` float64 arrays of their size."""
    each = 8 * arrays * group.stacked_rank * (sum(group.shape) + group.stacked_rank)
    for batch in group.batches(max(1, context.workspace_bytes // (2 * each))):
        yield stack_group(batch, adapters, context.device)


def in_float32(group: ModuleGroup, a: Tensor, b: Tensor) -> Stack:
    """A stack as the engine has it."""
    return Stack(group, a.float().contiguous(), b.float().contiguous())


def held_factors(changed: Sequence[Stack], adapters: int) -> list[Mapping[str, LoraFactors]]:
    """Each adapter's part of stacks of all modules."""
    held = HeldStacks(changed)
    return [held.of(index) for index in range(adapters)]
