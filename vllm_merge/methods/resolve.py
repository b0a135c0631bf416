# SPDX-License-Identifier: Apache-2.0
"""The value of every parameter at every adapter and module: per adapter, else per recipe, else the default."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_merge.errors import UserInputError
from vllm_merge.methods.registry import MethodSpec

Scalars = tuple[tuple[tuple[str, tuple[float, ...]], ...], tuple[tuple[str, Any], ...], float]
"""Per-adapter parameters with a value for each adapter, per-recipe parameters, and λ."""


@dataclass(frozen=True, slots=True)
class ResolvedParameters:
    """per_adapter[name][i] are the candidates of adapter i in order of precedence, scalars or {module: value};
    per_recipe are plain keyword arguments; lam is λ, a scalar or {module: value}, with its default."""

    per_adapter: Mapping[str, Sequence[Sequence[Any]]]
    per_recipe: Mapping[str, Any]
    lam: Sequence[Any]

    @property
    def unscaled(self) -> bool:
        """Whether λ is 1 everywhere."""
        return not _by_module([self.lam]) and float(self.lam[0]) == 1.0

    @property
    def scalars(self) -> Scalars | None:
        """Per-adapter and per-recipe parameters and λ as what can be looked up; None where one differs by module, or is a list."""
        if _by_module([self.lam]) or any(map(_by_module, self.per_adapter.values())):
            return None
        if not all(isinstance(value, Hashable) for value in self.per_recipe.values()):
            return None
        own = tuple((name, tuple(float(chain[0]) for chain in chains)) for name, chains in self.per_adapter.items())
        return own, tuple(self.per_recipe.items()), float(self.lam[0])

    def tensors(self, modules: Sequence[str], device: torch.device) -> dict[str, Tensor]:
        """The per-adapter parameters at these modules, each (modules, n) float64."""
        found = {name: _table(chains, modules) for name, chains in self.per_adapter.items()}
        if device.type == "cpu":
            return found
        return {name: table.to(device, non_blocking=True) for name, table in found.items()}

    def lambdas(self, modules: Sequence[str], device: torch.device) -> Tensor:
        """λ at these modules, (modules,) float64."""
        return _table([self.lam], modules)[:, 0].to(device, non_blocking=True)


def _table(chains: Sequence[Sequence[Any]], modules: Sequence[str]) -> Tensor:
    """The first candidate of every chain at every module, (modules, chains) float64."""
    if _by_module(chains):
        return torch.tensor([[_first(chain, module) for chain in chains] for module in modules], dtype=torch.float64)
    return torch.tensor([[float(chain[0]) for chain in chains]], dtype=torch.float64).expand(len(modules), -1)


def _by_module(chains: Sequence[Sequence[Any]]) -> bool:
    """Whether the first candidate of a chain differs by module."""
    return any(not isinstance(chain[0], float) and isinstance(chain[0], Mapping) for chain in chains)


def _first(candidates: Sequence[Any], module: str) -> float:
    for candidate in candidates:
        if not isinstance(candidate, Mapping):
            return float(candidate)
        if module in candidate:
            return float(candidate[module])
    raise AssertionError("the last candidate is the default, a scalar")


def resolve_parameters(
    spec: MethodSpec,
    space: str,
    names: Sequence[str],
    weights: Sequence[object] | None,
    parameters: Mapping[str, object] | None,
    adapter_parameters: Sequence[Mapping[str, object]] | None,
) -> ResolvedParameters:
    """Validate all given parameters and order them by precedence. names: the adapters'.

    Raises UserInputError for a wrong number of entries, an unknown parameter, or a value that is not allowed.
    """
    given: list[dict[str, object]] = [{} for _ in names]
    for title, entries in (("weights", weights), ("adapter_parameters", adapter_parameters)):
        if entries is not None and len(entries) != len(names):
            raise UserInputError(f"{title} has {len(entries)} entries for {len(names)} adapters; give one per adapter")
    for mine, extra in zip(given, adapter_parameters or [{} for _ in names], strict=True):
        mine.update(extra)
    if weights is not None:
        for name, mine, weight in zip(names, given, weights, strict=True):
            if "weight" in mine:
                raise UserInputError(f"adapter '{name}': its weight is given twice, in weights and adapter_parameters")
            mine["weight"] = weight
    recipe = spec.validate(space, parameters or {}, per_adapter=False)
    typed = []
    for name, mine in zip(names, given, strict=True):
        try:
            typed.append(spec.validate(space, mine, per_adapter=True) if mine else mine)
        except UserInputError as error:
            raise UserInputError(f"adapter '{name}': {error}") from None
    per_adapter = {
        name: [
            [*([mine[name]] if name in mine else []), *([recipe[name]] if name in recipe else []), default]
            for mine in typed
        ]
        for name, default in spec.defaults(per_adapter=True).items()
    }
    per_recipe = {**spec.defaults(per_adapter=False), **{k: v for k, v in recipe.items() if k not in per_adapter}}
    default = spec.parameter("lambda").default
    given_lambda = per_recipe.pop("lambda")
    return ResolvedParameters(per_adapter, per_recipe, [given_lambda, default])
