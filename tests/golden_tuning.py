# SPDX-License-Identifier: Apache-2.0
"""Golden cases of SSR: the inputs of each module stand in the case's own file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from vllm_merge.tuning.correction import ssr_correction

FOLDER = Path(__file__).parent / "golden"
Entry = Mapping[str, Any]


def recipe_for(entry: Entry, folder: Path = FOLDER) -> dict[str, Any] | None:
    """Keyword arguments of `merge` for an entry of SSR, else None."""
    if entry.get("method") != "ssr":
        return None
    tensors = load_file(folder / entry["file"])
    inputs = {
        f"adapter{index}": {module: tensors[f"in.{index}.{module}.features"] for module in entry["modules"]}
        for index in range(entry["n_adapters"])
    }
    correction = ssr_correction(inputs, ridge=entry["params"]["lambda_reg"])
    return {"merge_method": "task_arithmetic", "precondition": [correction]}
