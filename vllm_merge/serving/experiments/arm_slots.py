# SPDX-License-Identifier: Apache-2.0
"""Whether the arms of all experiments fit into vLLM's slots beside everybody else."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING

from vllm_merge.recipe.file import RecipeFile
from vllm_merge.recipe.problems import Problem, RecipeError, dotted

if TYPE_CHECKING:
    from vllm_merge.serving.control.names import Name


def check_slots(recipes: RecipeFile, names: Mapping[str, Name], max_loras: int, now: datetime) -> None:
    """Raises RecipeError where the arms of experiments that have not ended need more than max_loras − 1 slots.

    Arms with the same artifact share a slot, and the base model takes none.
    """
    slots: set[str] = set()
    parts = []
    for name, experiment in recipes.experiments.items():
        if experiment.end is not None and experiment.end <= now:
            continue
        served = [names[arm.serve].digest for arm in experiment.arms.values() if arm.serve in names]
        new = {digest for digest in served if digest is not None} - slots
        slots |= new
        parts.append(f"{len(new)} for {name}")
    if len(slots) <= max_loras - 1:
        return
    lines = [recipes.lines.get(dotted(("experiments", name))) for name in recipes.experiments]
    line = min((line for line in lines if line is not None), default=None)
    message = (
        f"the arms need {' + '.join(parts)} = {len(slots)} slots, but --max-loras {max_loras} leaves {max_loras - 1} beside "
        f"one for all others; start vLLM with --max-loras {len(slots) + 1}, or run fewer arms at a time"
    )
    raise RecipeError(recipes.path, [Problem(("experiments",), line, message)])
