# SPDX-License-Identifier: Apache-2.0
"""What `vllm-merge doctor` looks at outside of vLLM: Python, torch, memory, a recipe file, its adapters and their model."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from vllm_merge.adapters.base_fit import misfit, read_base_shapes, tied_weight
from vllm_merge.adapters.base_model import WEIGHT_SUFFIXES, base_model_folder
from vllm_merge.adapters.catalogue import Catalogue
from vllm_merge.errors import MergeError, UserInputError
from vllm_merge.methods.registry import FULL_RANK_SPACES, default_registry
from vllm_merge.recipe.file import RecipeFile, begins_as_path
from vllm_merge.recipe.problems import counted
from vllm_merge.recipe_files import load_recipes
from vllm_merge.serving.launch import ACCEPTED_RANKS, accepted_rank

PYTHONS = ((3, 11), (3, 12))
OLDEST_TORCH = (2, 9)
LITTLE_MEMORY = 2 << 30

State = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: what was found, and what to do about it where it is not ok."""

    name: str
    state: State
    found: str
    advice: str = ""


def check_python() -> Check:
    """The version of Python."""
    found = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] in PYTHONS:
        return Check("Python", "ok", found)
    return Check("Python", "problem", found, "use Python 3.11 or 3.12: make a virtual environment with one of them")


def check_torch() -> Check:
    """torch's version, and the devices that it sees."""
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2] if part.isdigit())
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    found = f"{torch.__version__}, {', '.join(devices) or 'CPU only'}"
    if version < OLDEST_TORCH:
        return Check("torch", "problem", found, "install torch 2.9 or newer, the one that your vLLM asks for")
    return Check("torch", "ok", found)


def check_memory() -> Iterator[Check]:
    """What is free of the machine's memory and of each GPU's."""
    free = _available_memory()
    if free is not None:
        text = f"{free / 2**30:.1f} GiB available"
        few = "stop other programs: a server needs the base model's weights, its KV cache and the merged adapters"
        yield Check("memory", "warning", text, few) if free < LITTLE_MEMORY else Check("memory", "ok", text)
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        text = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
        taken = "something else uses it: stop that, or lower --gpu-memory-utilization"
        name = f"memory of GPU {index}"
        yield Check(name, "warning", text, taken) if free < total / 2 else Check(name, "ok", text)


def _available_memory() -> int | None:
    """Bytes that a new program may take, where the kernel tells (Linux)."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def check_config(path: Path, model: str | None) -> Iterator[Check]:
    """A recipe file, its adapters, their ranks, and the base model."""
    try:
        file = load_recipes(path)
    except UserInputError as error:
        first, *more = str(error).splitlines()
        rest = f" (and {len(more)} more; `vllm-merge validate {path}` lists them)" if more else ""
        yield Check("config", "problem", f"{path} is wrong", f"correct {first}{rest}")
        return
    counts = (("adapter", file.adapters), ("recipe", file.recipes), ("alias", file.aliases))
    yield Check("config", "ok", f"{path}: " + ", ".join(counted(len(items), word) for word, items in counts))
    catalogue = Catalogue()
    wrong = []
    for name, entry in file.adapters.items():
        try:
            catalogue.register(name, entry.path, entry.revision)
        except MergeError as error:
            wrong.append(name)
            yield Check(f"adapter {name}", "problem", "cannot be used", str(error))
            continue
        summary = catalogue.get(name).summary
        found = f"{summary.modules} modules, rank {summary.rank}"
        yield (
            Check(f"adapter {name}", "warning", found, "; ".join(summary.warnings))
            if summary.warnings
            else Check(f"adapter {name}", "ok", found)
        )
    if not wrong:
        yield _check_ranks(file, catalogue)
    yield from check_base(model or file.base_model, catalogue)


def _check_ranks(file: RecipeFile, catalogue: Catalogue) -> Check:
    """The ranks that the server has to take, against those that vLLM accepts."""
    highest = ACCEPTED_RANKS[-1]
    ranks = {name: catalogue.get(name).summary.rank for name in catalogue.names()}
    known = dict(ranks)
    full = []
    for name in (stage for recipe in file.recipes for stage in file.stage_order(recipe)):
        recipe = file.recipes[name]
        sources = sum(known[source] for source in recipe.sources)
        known[name] = recipe.rank if isinstance(recipe.rank, int) else sources
        space = recipe.space or default_registry().get(recipe.merge_method).default_space
        if recipe.rank == "lossless" and space in FULL_RANK_SPACES:
            full.append(name)
    name, rank = max(known.items(), key=lambda item: item[1], default=("", 1))
    accepted = accepted_rank(rank)
    if full:
        return Check(
            "ranks",
            "problem",
            f"recipe {full[0]} keeps the full rank of the weights",
            f"give recipe {full[0]} `rank: auto`: a lossless result in space delta is of a higher rank than vLLM takes",
        )
    if accepted is None and (name in ranks or isinstance(file.recipes[name].rank, int)):
        advice = f"lower the rank of {name}: vLLM takes at most {highest} (--max-lora-rank)"
        return Check("ranks", "problem", f"{name} has rank {rank}", advice)
    if accepted is None:
        advice = f"{name} will be cut to rank {highest}; `vllm-merge plan {file.path} {name}` says what that loses"
        return Check("ranks", "warning", f"{name} may have rank {rank}", advice)
    return Check("ranks", "ok", f"at most {rank}: --max-lora-rank {accepted}")


def check_base(model: str | None, catalogue: Catalogue | None = None) -> Iterator[Check]:
    """Whether the base model is on this machine, and the adapters are of it."""
    if model is None:
        advice = "add base_model to the file, or name the model: `vllm-merge doctor --config FILE MODEL`"
        yield Check("base model", "warning", "not named", advice)
        return
    folder = base_model_folder(model)
    if folder is None:
        local = begins_as_path(model)
        advice = "correct the path of the base model" if local else f"fetch it first: `hf download {model}`"
        yield Check("base model", "problem" if local else "warning", f"{model} is not on this machine", advice)
        return
    try:
        if not (folder / "config.json").is_file() or not any(f.suffix in WEIGHT_SUFFIXES for f in folder.iterdir()):
            advice = f"give the folder of a model: {folder} lacks config.json or weights"
            yield Check("base model", "problem", f"{model} is not complete", advice)
            return
        base = read_base_shapes(folder)
    except MergeError as error:
        yield Check("base model", "problem", f"{model} is damaged", str(error))
        return
    yield Check("base model", "ok", str(folder))
    registered = catalogue or Catalogue()
    for name in registered.names():
        adapter = registered.get(name)
        reason = misfit(base, adapter.shapes, adapter.embeddings)
        if reason is not None:
            advice = f"take another adapter or base model: {reason}"
            yield Check(f"fit of {name}", "problem", "not of this base model", advice)
        elif (tied := tied_weight(base, adapter.shapes, adapter.embeddings)) is not None:
            yield Check(f"fit of {name}", "warning", "a tied weight", tied)
