# SPDX-License-Identifier: Apache-2.0
"""How much work a merge is, from shapes and ranks alone: the quantities that its time and memory are fitted with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from vllm_merge.algebra.symmetric import LARGEST_AT_ONCE
from vllm_merge.algebra.truncation import OVERSAMPLING
from vllm_merge.methods.registry import MethodSpec

Scale = Literal["call", "bytes", "operations"]

QUANTITIES: Mapping[str, Scale] = {
    "fixed": "call",
    "modules": "call",
    "stacked": "bytes",
    "grams": "operations",
    "beyond": "call",
    "entries": "bytes",
    "products": "operations",
    "sketch": "operations",
}
"""The quantities, and which figure of a device's speed the seconds of each go with. `beyond` goes with the host, whose speed
shows in how long it takes to start a call."""


@dataclass(frozen=True, slots=True)
class ModuleSize:
    """One module: ΔW is (d_out, d_in), the adapters have these ranks there, the result has `rank`."""

    d_out: int
    d_in: int
    ranks: tuple[int, ...]
    rank: int


def quantities(space: str, modules: Sequence[ModuleSize], oversampling: int = OVERSAMPLING) -> dict[str, float]:
    """{quantity: how much of it}, K = Σ r_i.

    In every space: fixed: 1. beyond: K³ where K is more than the kernels for small matrices take, and the host's cores find
    eigenvalues, one matrix after the other. Below, a GPU has all at once, and their time is in `fixed`.
    In all but `delta`: stacked: K (d_out + d_in). grams: K² (d_out + d_in).
    In `delta` alone, entries: n d_out d_in, of the tasks' matrices. products: K d_out d_in. sketch: (rank + oversampling)
    d_out d_in, of the range finder.
    """
    total = dict.fromkeys(QUANTITIES, 0.0)
    dense = space == "delta"
    total["fixed"] = 1.0
    for module in modules:
        k, side, size = sum(module.ranks), module.d_out + module.d_in, module.d_out * module.d_in
        total["modules"] += 1
        total["beyond"] += k**3 if k > LARGEST_AT_ONCE else 0
        if dense:
            total["entries"] += len(module.ranks) * size
            total["products"] += k * size
            total["sketch"] += min(module.rank + oversampling, module.d_out, module.d_in) * size
        else:
            total["stacked"] += k * side
            total["grams"] += k * k * side
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
