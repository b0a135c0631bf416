# SPDX-License-Identifier: Apache-2.0
"""The file that a run goes on from: all tensors of the learner, and beside them what the run is and how it went."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vllm_merge.errors import UserInputError

STATE_FILE = "state.safetensors"


@dataclass
class Progress:
    """How a run goes. history: [step, loss of the step, value of what was learned or None]. best: the smallest value.

    start: the value before the first step.
    """

    done: int = 0
    start: float | None = None
    best: float | None = None
    best_step: int = 0
    seconds: float = 0.0
    history: list[tuple[int, float, float | None]] = field(default_factory=list)


def save_state(
    folder: Path, run: Mapping[str, Any], progress: Progress, learner: Mapping[str, Tensor], best: Tensor | None
) -> None:
    """Write the state over the earlier one by a rename. run: what must be the same for the run to go on."""
    # Copies: the file takes no two tensors that share memory.
    tensors = {f"learner.{name}": value.detach().cpu().clone().contiguous() for name, value in learner.items()}
    if best is not None:
        tensors["best"] = best.clone().contiguous()
    beside = folder / f".{STATE_FILE}"
    metadata = {"run": json.dumps(run, sort_keys=True), "progress": json.dumps(asdict(progress))}
    save_file(tensors, beside, metadata=metadata)
    beside.replace(folder / STATE_FILE)


def load_state(folder: Path, run: Mapping[str, Any]) -> tuple[Progress, dict[str, Tensor], Tensor | None]:
    """The progress, the learner's state and the best weights. Raises UserInputError where there is none of this run."""
    path = folder / STATE_FILE
    if not path.is_file():
        raise UserInputError(f"--resume: {folder} has no {STATE_FILE}; leave the option out to begin anew")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        before, progress = json.loads(metadata["run"]), Progress(**json.loads(metadata["progress"]))
        progress.history = [(step, loss, value) for step, loss, value in progress.history]
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise UserInputError(f"--resume: {path} cannot be read ({error}); begin anew without the option") from None
    now = json.loads(json.dumps(run))
    if other := [name for name in now if before.get(name) != now[name]]:
        differs = "; ".join(f"{name}: it was {before.get(name)!r}, now {now[name]!r}" for name in other)
        raise UserInputError(
            f"--resume: {folder} is of another run ({differs}); give the same again, or another --output to begin anew"
        )
    best = tensors.pop("best", None)
    learner = {name.removeprefix("learner."): value for name, value in tensors.items()}
    return progress, learner, best
