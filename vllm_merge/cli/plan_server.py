# SPDX-License-Identifier: Apache-2.0
"""vllm-merge plan --server: what a server with these recipes would take of a GPU, and what to change where it does not fit."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from vllm_merge.adapters.base_model import base_model_folder, base_model_hash
from vllm_merge.adapters.catalogue import Catalogue
from vllm_merge.cli.files import check_fit, register_all
from vllm_merge.cli.output import ProgressBar, add_row, print_json, print_table, print_text, progress_bar, table
from vllm_merge.cli.serve import recipe_rank
from vllm_merge.errors import UserInputError
from vllm_merge.forecast.server import Budget, Decoder, Gpu, Parallel, Reserved, budget
from vllm_merge.forecast.server_fit import Demand, Fit, fit, gib
from vllm_merge.methods.registry import default_registry
from vllm_merge.recipe.bounds import stage_bounds
from vllm_merge.recipe.file import RecipeFile
from vllm_merge.recipe.plan import make_plan
from vllm_merge.recipe.schema import BASE
from vllm_merge.recipe_files import load_recipes
from vllm_merge.serving.launch import ACCEPTED_RANKS, DEFAULT_MAX_LORAS, accepted_rank
from vllm_merge.serving.settings import WorkerSettings

if TYPE_CHECKING:
    from vllm_merge.recipe.dtypes import Dtype

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([kmgt]i?)?b?", re.IGNORECASE)
DOES_NOT_FIT = 1


@dataclass(frozen=True)
class ServerOptions:
    """The options of --server, as they were given; None: not given."""

    model: str | None
    dtype: Dtype | None
    max_loras: int | None
    max_rank: int | None
    tensor: int
    pipeline: int
    gpu_memory: str | None
    utilization: float
    other: str
    max_length: int | None


@dataclass(frozen=True)
class ServerPlan:
    """measured_weights: whether the weights are those of files, and not of shapes. disk: the tier's place, None without one."""

    budget: Budget
    reserved: Reserved
    demand: Demand
    fit: Fit
    gpu: Gpu | None
    max_loras: int
    max_rank: int
    max_length: int
    dtype: str
    parallel: Parallel
    measured_weights: bool
    disk: str | None
    disk_bytes: int


def plan_server(path: Path, options: ServerOptions, as_json: bool) -> None:
    """Print the plan. Ends with 1 where something does not fit."""
    with progress_bar("Reading the recipes") as bar:
        found = make_server_plan(path, options, bar)
    if as_json:
        print_json(facts(found))
    else:
        _print(found)
    if found.fit.problems:
        raise typer.Exit(DOES_NOT_FIT)


def make_server_plan(path: Path, options: ServerOptions, bar: ProgressBar) -> ServerPlan:
    """Read the file, its adapters, the model's config.json and the environment. Raises UserInputError."""
    file = load_recipes(path)
    name = options.model or file.base_model
    if name is None:
        raise UserInputError(f"{path}: names no base_model; give --model")
    folder = Path(name).expanduser() if Path(name).expanduser().is_file() else base_model_folder(name)
    if folder is None:
        raise UserInputError(f"{name} is not on this machine; give --model with its folder, or its config.json alone")
    model = Decoder.read(folder)
    dtype = options.dtype or model.dtype
    catalogue = register_all(file, bar=bar)
    if file.base_model and folder.is_dir():
        check_fit(str(folder), catalogue)
    demand, wanted = _demand(file, catalogue, dtype, options.max_rank)
    max_loras = options.max_loras or DEFAULT_MAX_LORAS
    max_rank = options.max_rank or accepted_rank(wanted) or ACCEPTED_RANKS[-1]
    gpu = None
    if options.gpu_memory is not None:
        gpu = Gpu(_bytes("--gpu-memory", options.gpu_memory), options.utilization, _bytes("--other", options.other))
    parallel = Parallel(options.tensor, options.pipeline)
    settings = WorkerSettings.read()
    reserved = Reserved(
        cache=settings.cache_bytes,
        merges=settings.merge_bytes_on(gpu.memory if gpu is not None else None),
        host=settings.host_bytes_on("cuda"),
        sources=settings.source_bytes,
    )
    taken = budget(model, max_loras, max_rank, dtype, parallel, reserved, gpu)
    max_length = options.max_length or model.max_length
    checked = fit(
        model,
        demand,
        taken,
        reserved,
        max_loras=max_loras,
        max_rank=max_rank,
        max_length=max_length,
        parallel=parallel,
        accepted_ranks=ACCEPTED_RANKS,
    )
    return ServerPlan(
        taken,
        reserved,
        demand,
        checked,
        gpu,
        max_loras,
        max_rank,
        max_length,
        dtype,
        parallel,
        model.weight_bytes is not None,
        settings.disk,
        settings.disk_bytes,
    )


def facts(found: ServerPlan) -> dict[str, Any]:
    """The plan as JSON data; bytes of one GPU, or of one worker's host memory."""
    return {
        "fits": not found.fit.problems,
        "gpu": {
            **asdict(found.budget),
            "tokens": found.budget.tokens,
            "memory": found.gpu.memory if found.gpu else None,
            "usable": found.gpu.usable if found.gpu else None,
        },
        "host": {"artifacts": found.reserved.host, "sources": found.reserved.sources},
        "disk": {"place": found.disk, "bytes": found.disk_bytes if found.disk else None},
        "max_loras": found.max_loras,
        "max_lora_rank": found.max_rank,
        "max_model_len": found.max_length,
        "dtype": found.dtype,
        "tensor_parallel_size": found.parallel.tensor,
        "pipeline_parallel_size": found.parallel.pipeline,
        "recipes": {
            name: {"bytes_bound": size, "rank_bound": rank, "eager": name in found.demand.eager}
            for name, (size, rank) in found.demand.artifacts.items()
        },
        "adapters": dict(found.demand.adapters),
        "problems": found.fit.problems,
        "advice": found.fit.advice,
    }


def _demand(file: RecipeFile, catalogue: Catalogue, dtype: Dtype, max_rank: int | None) -> tuple[Demand, int]:
    """What the file asks for, and the rank that `vllm-merge serve` would ask vLLM for."""
    shapes = {name: catalogue.get(name).shapes for name in file.adapters}
    hashes = {name: catalogue.content_hash(name) for name in file.adapters}
    known = file.with_paths(catalogue.paths())
    base = base_model_hash(file.base_model) if file.base_model else ""
    artifacts = {}
    for name in file.recipes:
        plan = make_plan(
            known,
            name,
            registry=default_registry(),
            adapter_hashes=hashes,
            base_model_hash=base,
            max_rank=max_rank,
            dtype=dtype,
        )
        bound = stage_bounds(plan, shapes)[name]
        artifacts[name] = (bound.bytes, bound.rank)
    ranks = {name: catalogue.get(name).summary.rank for name in file.adapters}
    wanted = max([*(recipe_rank(file, name, ranks) for name in file.recipes), *ranks.values()], default=1)
    demand = Demand(
        artifacts,
        [name for name, recipe in file.recipes.items() if recipe.load == "eager"],
        {name: catalogue.get(name).summary.size_bytes for name in file.adapters},
        len(file.recipes) + len(file.adapters),
        {name: len({arm.serve for arm in e.arms.values()} - {BASE}) for name, e in file.experiments.items()},
    )
    return demand, wanted


def _bytes(option: str, text: str) -> int:
    match = _SIZE.fullmatch(text.strip())
    if match is None or (match[2] is None and 0 < float(match[1]) < 2**20):  # meant was GiB
        raise UserInputError(f"{option} is {text!r}; give bytes with a unit, such as 80GiB or 24GB")
    return int(float(match[1]) * _UNITS[(match[2] or "").lower()])


def _print(found: ServerPlan) -> None:
    taken, gpu = found.budget, found.gpu
    rows = table("on each GPU", "", "")
    how = "of the weight files" if found.measured_weights else "estimated from config.json"
    add_row(rows, "weights", gib(taken.weights), how)
    add_row(rows, "LoRA slots", gib(taken.slots), f"{found.max_loras} of rank {found.max_rank}, {found.dtype}")
    add_row(rows, "merged adapters", gib(taken.cache), "VLLM_MERGE_CACHE_BYTES")
    add_row(rows, "merges that run", gib(taken.merges), "twice VLLM_MERGE_WORKSPACE_BYTES")
    if gpu is not None and taken.kv_cache is not None:
        add_row(rows, "vLLM itself", gib(taken.other), "assumed (--other): activations, CUDA graphs")
        tokens = (
            f"{taken.tokens:,} tokens, {(taken.tokens or 0) / found.max_length:.1f} sequences of {found.max_length:,}"
        )
        add_row(rows, "KV cache", gib(max(0, taken.kv_cache)), tokens)
        add_row(rows, "together", gib(gpu.usable), f"{gpu.utilization:.0%} of {gib(gpu.memory)}")
    else:
        add_row(rows, "together", gib(taken.taken), "give --gpu-memory to see what is left for the KV cache")
    print_table(rows)
    print_text("")
    rows = table("in host memory of each worker, pinned", "", "")
    add_row(rows, "merged adapters", gib(found.reserved.host), "VLLM_MERGE_HOST_BYTES")
    add_row(rows, "adapters to merge", gib(found.reserved.sources), "VLLM_MERGE_SOURCE_BYTES")
    print_table(rows)
    print_text("")
    rows = table("recipe", "at most", "rank at most", "load")
    for name, (count, rank) in found.demand.artifacts.items():
        add_row(rows, name, gib(count), rank, "eager" if name in found.demand.eager else "lazy")
    print_table(rows)
    for text in found.fit.problems:
        print_text(f"does not fit: {text}", style="bold red")
    for text in found.fit.advice:
        print_text(f"better: {text}")
    if not found.fit.problems:
        print_text("it fits" if gpu is not None else "nothing speaks against it", style="bold")
