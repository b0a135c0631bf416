# SPDX-License-Identifier: Apache-2.0
"""Weights of adapters by module: shared within groups while they are learned, and as a recipe writes them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Per = Literal["adapter", "layer", "part", "module"]
DECIMALS = 4  # of a weight in a recipe
_LAYER = re.compile(r"^.*?\.\d+\.")


def layer_of(module: str) -> str:
    """`model.layers.3.` of `model.layers.3.mlp.up_proj`; the name itself where there is no number."""
    found = _LAYER.match(module)
    return found[0] if found else module


def kind_of(module: str) -> str:
    """`mlp` of `model.layers.3.mlp.up_proj`: what follows its layer; the name itself where there is no number."""
    layer = layer_of(module)
    return module.removeprefix(layer).partition(".")[0] or module


def _block_of(module: str) -> str:
    """`model.layers.3.mlp` of `model.layers.3.mlp.up_proj`."""
    layer = layer_of(module)
    return module if layer == module else layer + kind_of(module)


@dataclass(frozen=True)
class Groups:
    """Which modules share a weight. index: (modules,) int64, the group of each module; names: of the groups."""

    modules: tuple[str, ...]
    index: Tensor
    names: tuple[str, ...]

    @classmethod
    def of(cls, modules: Sequence[str], per: Per) -> Groups:
        """One group of all, one by layer, two by layer with attention and MLP apart, or one by module."""
        label: Callable[[str], str] = {"layer": layer_of, "part": _block_of}.get(per, str)
        labels = ["all" if per == "adapter" else label(module) for module in modules]
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
    return filtered(dict(zip(modules, column, strict=True)))


def filtered(values: Mapping[str, float | None], rest: float | None = None) -> Any:
    """{module: value} as a recipe's value, rounded: a number, or the fewest filters that say it.

    values: of all modules of the merge; None: any value will do. rest: a value that modules get without a filter of theirs.
    """
    known = {module: round(value, DECIMALS) for module, value in values.items() if value is not None}
    if len(set(known.values())) == 1:
        return next(iter(known.values()))
    for label in (kind_of, layer_of, _block_of, str):
        labelled: dict[str, set[float]] = {}
        for module, value in known.items():
            labelled.setdefault(label(module), set()).add(value)
        if all(len(found) == 1 for found in labelled.values()):
            items = {name: next(iter(found)) for name, found in labelled.items()}
            few = _filters({name: value for name, value in items.items() if value != rest}, rest)
            if all(next((i["value"] for i in few if i.get("filter", "") in m), None) == v for m, v in known.items()):
                return few
    return _filters(known, rest)


def _filters(items: Mapping[str, float], rest: float | None) -> list[dict[str, Any]]:
    """A filter takes the modules whose names contain it, and the first that does wins: longer ones come first."""
    contained = {name for name in items if any(name in other for other in items if other != name)}
    order = [name for name in items if name not in contained] + sorted(contained, key=len, reverse=True)
    last = [] if rest is None else [{"value": rest}]
    return [*({"filter": name, "value": items[name]} for name in order), *last]
