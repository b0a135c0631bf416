# SPDX-License-Identifier: Apache-2.0
"""A fingerprint of what every method makes of a fixed small input, alone and behind every precondition.

    python -m tests.methods.recorded        record it anew, after a change of numbers and of the method's version

The fingerprint is a list of inner products of the dense result with fixed patterns, to 5 significant digits, relative to
its norm: a hash that another BLAS does not change, because it is compared within a tolerance.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tests.adapters_in_memory import SHAPES, deltas, random_adapter, three
from tests.methods.cases import identified
from vllm_merge import Adapter, list_methods, merge
from vllm_merge.methods.registry import MethodSpec, default_registry

FILE = Path(__file__).parent / "recorded_hashes.json"
LENGTH = 12
WEIGHTS = [1.0, 0.75, 1.5]


def inputs(method: str) -> list[Adapter]:
    """Three adapters, or as many as the method takes; of one rank for methods that add factors up."""
    spec = next(spec for spec in list_methods() if spec.name == method)
    if spec.exact:
        return three()[: spec.most_adapters]
    return [random_adapter(name, 4, seed, scaling=0.5 * seed) for seed, name in enumerate("xyz", 1)]


def fingerprint(method: str, space: str, precondition: str | None = None) -> list[float]:
    """‖ΔW‖_F over all modules, and LENGTH inner products with patterns of cosines, divided by it."""
    adapters = identified(inputs(method))
    weights = WEIGHTS[: len(adapters)]
    arguments: dict[str, Any] = {"weights": weights, "rank": "lossless", "seed": 7, "report": "brief"}
    arguments["precondition"] = [] if precondition is None else [precondition]
    merged = merge(adapters, merge_method=method, space=space, **arguments)
    flat = torch.cat([deltas(merged)[module].flatten() for module in SHAPES])
    norm = float(flat.norm())
    position = torch.arange(flat.numel(), dtype=torch.float64)
    products = [float(torch.cos((step + 1) * 0.7071 * position) @ flat) / norm for step in range(LENGTH)]
    return [float(f"{value:.5g}") for value in [norm, *products]]


def places() -> Iterator[tuple[str, MethodSpec, str, str | None, str]]:
    """(name, method, space, precondition, version) of everything that is recorded: each method in each of its spaces,
    alone and behind each precondition."""
    registry = default_registry()
    for spec in list_methods():
        for space in spec.spaces:
            yield f"{spec.name}/{space}", spec, space, None, str(spec.version)
            for step in registry.precondition_names():
                version = f"{spec.version}, {step} {registry.precondition(step).version}"
                yield f"{spec.name}/{space}/{step}", spec, space, step, version


def current() -> dict[str, dict[str, Any]]:
    """Version and fingerprint of everything that is recorded."""
    return {
        name: {"version": version, "fingerprint": fingerprint(spec.name, space, step)}
        for name, spec, space, step, version in places()
    }


if __name__ == "__main__":
    lines = [f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in sorted(current().items())]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
