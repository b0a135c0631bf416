# SPDX-License-Identifier: Apache-2.0
"""A fingerprint of what every method makes of a fixed small input, as recorded_hashes.json has it.

    python -m tests.methods.recorded        record it anew, after a change of numbers and of the method's version

The fingerprint is a list of inner products of the dense result with fixed patterns, to 5 significant digits, relative to
its norm: a hash that another BLAS does not change, because it is compared within a tolerance.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tests.adapters_in_memory import SHAPES, deltas, three
from tests.methods.cases import identified
from vllm_merge import list_methods, merge

FILE = Path(__file__).parent / "recorded_hashes.json"
LENGTH = 12
WEIGHTS = [1.0, 0.75, 1.5]


def fingerprint(method: str, space: str) -> list[float]:
    """‖ΔW‖_F over all modules, and LENGTH inner products with patterns of cosines, divided by it."""
    merged = merge(identified(three()), merge_method=method, space=space, weights=WEIGHTS, rank="lossless", seed=7)
    flat = torch.cat([deltas(merged)[module].flatten() for module in SHAPES])
    norm = float(flat.norm())
    position = torch.arange(flat.numel(), dtype=torch.float64)
    products = [float(torch.cos((step + 1) * 0.7071 * position) @ flat) / norm for step in range(LENGTH)]
    return [float(f"{value:.5g}") for value in [norm, *products]]


def current() -> dict[str, dict[str, Any]]:
    """Version and fingerprint of every method in every space."""
    return {
        f"{spec.name}/{space}": {"version": spec.version, "fingerprint": fingerprint(spec.name, space)}
        for spec in list_methods()
        for space in spec.spaces
    }


if __name__ == "__main__":
    lines = [f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in sorted(current().items())]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
