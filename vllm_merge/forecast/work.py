# SPDX-License-Identifier: Apache-2.0
"""How much work a merge is, from shapes and ranks alone: the quantities that its time and memory are fitted with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from vllm_merge.methods.registry import MethodSpec

Scale = Literal["call", "bytes", "operations"]

QUANTITIES: Mapping[str, Scale] = {
    "fixed": "call",
    "modules": "call",
    "pairs": "call",
    "stacked": "bytes",
    "grams": "operations",
    "cores": "operations",
    "entries": "bytes",
    "products": "operations",
    "sketch": "operations",
}
"""The quantities, and which figure of a device's speed the seconds of each go with."""


@dataclass(frozen=True, slots=True)
class ModuleSize:
    """One module: ΔW is (d_out, d_in), the adapters have these ranks there, the result has `rank`."""

    d_out: int
    d_in: int
    ranks: tuple[int, ...]
    rank: int


def quantities(space: str, modules: Sequence[ModuleSize]) -> dict[str, float]:
    """{quantity: how much of it}, K = Σ r_i.

    pairs: modules × adapters. stacked: K (d_out + d_in). grams: K² (d_out + d_in). cores: K³. entries: of the tasks'
    matrices, n K d_in in `knots` and n d_out d_in in `delta`. products and sketch: K d_out d_in and rank · d_out d_in,
    in `delta` alone.
    """
    total = dict.fromkeys(QUANTITIES, 0.0)
    total["fixed"] = 1.0
    for module in modules:
        k, n, side = sum(module.ranks), len(module.ranks), module.d_out + module.d_in
        total["modules"] += 1
        total["pairs"] += n
        total["stacked"] += k * side
        total["grams"] += k * k * side
        total["cores"] += k**3
        if space == "knots":
            total["entries"] += n * k * module.d_in
        if space == "delta":
            size = module.d_out * module.d_in
            total["entries"] += n * size
            total["products"] += k * size
            total["sketch"] += module.rank * size
    return total


def works_in(spec: MethodSpec, space: str, parameters: Mapping[str, object], *, cut: bool) -> str:
    """The space whose quantities a merge of a bounded rank is made of: `core` for columns that are scaled and nothing cut,
    which takes Gram matrices and the factors, and no entry of a ΔW_i.
    """
    return "core" if not cut and spec.scales_columns(parameters) else space


def case_key(
    method: str, space: str, *, cut: bool, parameters: Mapping[str, object], defaults: Mapping[str, object]
) -> str:
    """The name of a way to merge whose time has constants of its own, such as `ties/knots/cut`.

    cut: whether the rank is less than what the rule makes. Parameters other than numbers with a fraction belong to it
    where they are not the defaults: they choose between algorithms and count steps.
    """
    special = [
        f"{name}={value}"
        for name, value in sorted(parameters.items())
        if name != "lambda" and isinstance(value, bool | int | str) and value != defaults.get(name)
    ]
    return "/".join([method, space, "cut" if cut else "whole", *special])
