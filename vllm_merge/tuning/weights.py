# SPDX-License-Identifier: Apache-2.0
"""Weights of adapters by module: shared within groups while they are learned, and as a recipe writes them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Per = Literal["adapter", "layer", "module"]
DECIMALS = 4  # of a weight in a recipe
_LAYER = re.compile(r"^.*?\.\d+\.")


def layer_of(module: str) -> str:
    """`model.layers.3.` of `model.layers.3.mlp.up_proj`; the name itself where there is no number."""
    found = _LAYER.match(module)
    return found[0] if found else module


@dataclass(frozen=True)
class Groups:
    """Which modules share a weight. index: (modules,) int64, the group of each module; names: of the groups."""

    modules: tuple[str, ...]
    index: Tensor
    names: tuple[str, ...]

    @classmethod
    def of(cls, modules: Sequence[str], per: Per) -> Groups:
        """One group of all, one by layer, or one by module."""
        labels = ["all" if per == "adapter" else layer_of(module) if per == "layer" else module for module in modules]
        names = tuple(dict.fromkeys(labels))
        return cls(tuple(modules), torch.tensor([names.index(label) for label in labels]), names)

    def spread(self, grouped: Tensor) -> Tensor:
        """(modules, n) of (groups, n)."""
        return grouped[self.index.to(grouped.device)]

    def mean(self, table: Tensor) -> Tensor:
        """(groups, n), the mean of (modules, n) in each group."""
        sums = torch.zeros(len(self.names), table.shape[1], dtype=table.dtype).index_add_(0, self.index, table)
        return sums / torch.bincount(self.index, minlength=len(self.names))[:, None]


def rounded(table: Tensor) -> Tensor:
    """The weights as a recipe writes them, (modules, n) float64."""
    return table.detach().cpu().double().round(decimals=DECIMALS)


def written(modules: Sequence[str], column: Sequence[float]) -> Any:
    """One adapter's weights as a recipe's value: a number, or filters by layer, or by module where layers are not enough."""
    values = [round(value, DECIMALS) for value in column]
    if len(set(values)) == 1:
        return values[0]
    by_layer: dict[str, set[float]] = {}
    for module, value in zip(modules, values, strict=True):
        by_layer.setdefault(layer_of(module), set()).add(value)
    # A filter takes the modules whose names contain it, and the first that does wins: longer ones come first.
    items: Mapping[str, float]
    if all(len(found) == 1 for found in by_layer.values()):
        items = {layer: next(iter(found)) for layer, found in by_layer.items()}
    else:
        items = dict(zip(modules, values, strict=True))
    contained = {name for name in items if any(name in other for other in items if other != name)}
    order = [name for name in items if name not in contained] + sorted(contained, key=len, reverse=True)
    return [{"filter": name, "value": items[name]} for name in order]
