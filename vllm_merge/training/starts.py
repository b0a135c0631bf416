# SPDX-License-Identifier: Apache-2.0
"""OSRM starts for the adapters of several tasks, and the folders that they are trained on from."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vllm_merge.adapters.factors import Adapter, LoraFactors, natural_key
from vllm_merge.adapters.peft import CONFIG_FILE, WEIGHTS_FILE, write_adapter
from vllm_merge.errors import UserInputError
from vllm_merge.training.inputs import ALL_LINEAR, Batch, input_moments
from vllm_merge.training.osrm import Moments, Variant, osrm_init, projected

FACTS_FILE = "osrm.json"
LOSSY = (
    "projected after training, which is lossy: of each weight change only the part on directions that the other tasks' "
    "inputs use least is left"
)


@dataclass
class Start:
    """Where the adapter of a task begins: A (r, d_in) by module; and by module, how much of the inputs of the other
    tasks and of its own A sees, where random directions of its rank would see 1."""

    directions: dict[str, Tensor] = field(default_factory=dict)
    others: dict[str, float] = field(default_factory=dict)
    own: dict[str, float] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """Means over the modules, and the modules one by one."""
        modules = {name: {"others": self.others[name], "own": self.own[name]} for name in self.directions}
        return {"others": _mean(self.others), "own": _mean(self.own), "modules": modules}


def osrm_starts(
    model: nn.Module,
    layers: Mapping[str, nn.Linear],
    tasks: Mapping[str, Sequence[Batch]],
    rank: int,
    *,
    variant: Variant = "covariance",
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Start]:
    """A start for each task, its other tasks being all the rest. The result is on the CPU.

    Raises UserInputError for fewer than two tasks, a task without text, or a rank above the inputs of a layer.
    """
    if len(tasks) < 2:
        raise UserInputError(
            f"OSRM needs two tasks at least, to keep each out of the way of the others; found {len(tasks)}"
        )
    for task, batches in tasks.items():
        if not batches:
            raise UserInputError(f"task {task!r} has no samples with text in them")
    narrow = min(layers, key=lambda name: layers[name].in_features)
    if rank > layers[narrow].in_features:
        raise UserInputError(
            f"--rank {rank}: {narrow} has {layers[narrow].in_features} inputs, and a rank is at most that"
        )
    starts = {task: Start() for task in tasks}
    for modules, by_task in input_moments(model, layers, tasks, progress=progress):
        for index, task in enumerate(tasks):
            rest = {other: moments for other, moments in by_task.items() if other != task}
            directions = osrm_init(rest, rank, variant, seed=seed + index)
            others = Moments.sum(rest.values()).seen_by(directions)
            own = by_task[task].seen_by(directions)
            for name in modules:
                starts[task].directions[name] = directions.cpu().clone()  # each its own: a file has no shared tensors
                starts[task].others[name], starts[task].own[name] = others, own
    for start in starts.values():
        start.directions = {name: start.directions[name] for name in sorted(start.directions, key=natural_key)}
    return starts


def write_start(
    folder: Path, start: Start, layers: Mapping[str, nn.Linear], targets: Sequence[str], alpha: float, base_model: str
) -> None:
    """The PEFT folder of an adapter with B = 0, to be trained on; its facts beside."""
    tensors = {}
    for name, directions in start.directions.items():
        prefix = f"base_model.model.{name}"
        tensors[f"{prefix}.lora_A.weight"] = directions.contiguous()
        tensors[f"{prefix}.lora_B.weight"] = torch.zeros(layers[name].out_features, len(directions))
    folder.mkdir(parents=True)
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": False,
        "r": len(next(iter(start.directions.values()))),
        "lora_alpha": alpha,
        # PEFT knows all-linear as the whole value only, not beside other names.
        "target_modules": sorted(layers if ALL_LINEAR in targets else targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "init_lora_weights": True,
    }
    write_json(folder / CONFIG_FILE, config)
    write_json(folder / FACTS_FILE, {"kind": "initialisation", "lossy": False, **start.facts()})


def write_projected(folder: Path, adapter: Adapter, start: Start) -> float:
    """A trained adapter on the directions of its start, as a PEFT folder. Returns the share of ‖ΔW‖² that is left."""
    factors: dict[str, LoraFactors] = {}
    kept: dict[str, float] = {}
    before = after = 0.0
    for name, pair in adapter.factors.items():
        factors[name], kept[name] = projected(pair, start.directions[name])
        energy = float(factors[name].B.double().square().sum())
        after += energy
        before += energy / kept[name] if kept[name] > 0 else float(pair.delta().double().square().sum())
    write_adapter(folder, factors, base_model=adapter.base_model)
    share = after / before if before > 0 else 1.0
    facts = {"kind": "post-hoc", "lossy": True, "note": LOSSY, "of": adapter.name, "energy_kept": share}
    write_json(folder / FACTS_FILE, {**facts, "energy_kept_by_module": kept, **start.facts()})
    return share


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """`content`, indented."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _mean(values: Mapping[str, float]) -> float:
    return sum(values.values()) / len(values)
