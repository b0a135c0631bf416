# SPDX-License-Identifier: Apache-2.0
"""Runs a merge: groups modules by shape, works in batches and tiles within a workspace, cuts the result to its rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor

from vllm_merge.adapters.factors import Adapter, LoraFactors, embeddings_of
from vllm_merge.algebra.coordinates import task_norm
from vllm_merge.algebra.overview import Overview
from vllm_merge.algebra.ranks import RankPolicy
from vllm_merge.algebra.tiles import default_tile_entries
from vllm_merge.algebra.workspace import Workspace
from vllm_merge.artifact import MergedAdapter, MergeReport
from vllm_merge.engine.job import Job
from vllm_merge.errors import UserInputError
from vllm_merge.methods.preconditions import Context, Precondition, resolve_preconditions
from vllm_merge.methods.registry import default_registry
from vllm_merge.methods.resolve import resolve_parameters


def merge(
    adapters: Sequence[Adapter],
    *,
    merge_method: str,
    space: str | None = None,
    weights: Sequence[float | Mapping[str, float]] | None = None,
    parameters: Mapping[str, object] | None = None,
    adapter_parameters: Sequence[Mapping[str, float | Mapping[str, float]]] | None = None,
    precondition: Sequence[str | Mapping[str, object] | Precondition] = (),
    rank: int | str | Mapping[str, float] = "auto",
    max_rank: int | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    workspace_bytes: int = 2 << 30,
    report: Literal["full", "brief"] = "full",
    progress: Callable[[str, int, int], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
    name: str = "merged",
) -> MergedAdapter:
    """Merge adapters into one.

    merge_method, space: see `list_methods()`; every method has a default space.
    weights: one per adapter, short for the per-adapter parameter `weight`; a value may be {module: float}.
    parameters, adapter_parameters: of the recipe, and of each adapter; the latter come first, then the recipe's, then
    the method's defaults. Every method has `lambda`, which multiplies the result.
    precondition: names, or {name: parameters}, of what is done to the adapters before, in order; or functions that do it,
    such as `vllm_merge.tuning.correction.ssr_correction(inputs)`.
    rank: `auto` (at most max_rank, or Σ r_i of each module without one), `lossless`, the largest rank, or {energy: x},
    the smallest rank of each module that keeps the share x of ‖ΔW‖²_F. dtype: of the result's factors.
    device: where to work and leave the result; the default is where the first adapter's factors are.
    workspace_bytes: bound on what is held at once beside inputs and result. report: `brief` leaves out what the merge
    does not need itself: cosines, overlaps, effective ranks, and the sign conflict of methods that elect no signs.
    progress(stage, modules done, modules), cancelled(): called at every batch of modules and every tile.

    Raises UserInputError for arguments that are wrong, MergeError for factors or results that are not finite, and
    MergeCancelled as soon as cancelled() is true.
    """
    if not adapters:
        raise UserInputError("there is no adapter to merge; give at least one")
    spec = default_registry().get(merge_method)
    chosen = spec.check_space(space)
    policy = RankPolicy.parse(rank, max_rank)
    names = [adapter.name for adapter in adapters]
    embeddings = embeddings_of(adapters)
    resolved = resolve_parameters(spec, chosen, names, weights, parameters, adapter_parameters)
    changes = resolve_preconditions(precondition)
    zero = _zero_adapters(adapters)
    used = [index for index in range(len(adapters)) if index not in zero]

    def those(values: Sequence[Any] | None) -> list[Any] | None:
        return None if values is None else [values[index] for index in used]

    if zero:
        resolved = resolve_parameters(
            spec, chosen, [names[i] for i in used], those(weights), parameters, those(adapter_parameters)
        )
    target = torch.device(device) if device is not None else _device_of(adapters)
    _check_reachable(adapters, target)
    context = Context(target, seed, workspace_bytes)
    kept: Sequence[Adapter] = [adapters[index] for index in used]
    for change in changes:
        kept = change(kept, context)
    if spec.prepare is not None:
        kept = spec.prepare(kept, context, chosen, resolved)
    job = Job(
        adapters=list(kept),
        spec=spec,
        space=chosen,
        parameters=resolved,
        policy=policy,
        seed=seed,
        device=target,
        dtype=dtype,
        workspace=Workspace(workspace_bytes, default_tile_entries(target, workspace_bytes)),
        notify=progress or (lambda stage, done, total: None),
        cancelled=cancelled or (lambda: False),
        report=MergeReport(merge_method, chosen, adapters=[names[index] for index in used]),
        overview=Overview(len(used)) if report == "full" else None,
    )
    job.report.dropped_adapters = [adapter.name for i, adapter in enumerate(adapters) if i not in used]
    factors = job.run() if used else {}
    if embeddings:
        factors = {m: replace(pair, embedding=True) if m in embeddings else pair for m, pair in factors.items()}
    provenance = {
        "merge_method": merge_method,
        "method_version": spec.version,
        "space": chosen,
        "adapters": [{"name": adapter.name, "content_hash": adapter.known_hash} for adapter in adapters],
        "weights": None if weights is None else list(weights),
        "parameters": dict(parameters or {}),
        "adapter_parameters": None if adapter_parameters is None else [dict(mine) for mine in adapter_parameters],
        "precondition": [repr(entry) if callable(entry) else entry for entry in precondition],
        "rank": rank if isinstance(rank, int | str) else dict(rank),
        "max_rank": max_rank,
        "seed": seed,
        "dtype": str(dtype).removeprefix("torch."),
    }
    bases = {adapter.base_model for adapter in adapters}
    merged = MergedAdapter(name, factors, job.report, provenance, bases.pop() if len(bases) == 1 else None)
    job.settle()
    return merged


def _zero_adapters(adapters: Sequence[Adapter]) -> set[int]:
    """Which adapters are ΔW = 0 at every module. A module of each settles nearly all; two reads of the device do."""
    unknown = [index for index, adapter in enumerate(adapters) if adapter.found.zero is None]
    if unknown:
        device = _device_of(adapters)
        zero = set(unknown)
        for some in ((0, 1), (1, None)):
            pairs = {index: islice(adapters[index].factors.values(), *some) for index in zero}
            norms = {index: found for index, mine in pairs.items() if (found := [_norm(pair) for pair in mine])}
            if norms:
                largest = torch.stack([torch.stack(found).amax().to(device) for found in norms.values()])
                zero -= {index for index, norm in zip(norms, largest.tolist(), strict=True) if norm != 0}
        for index in unknown:
            adapters[index].found.zero = index in zero
    return {index for index, adapter in enumerate(adapters) if adapter.found.zero}


def _norm(factors: LoraFactors) -> Tensor:
    a, b = factors.A.double(), factors.B.double()
    return task_norm(a @ a.mT, b.mT @ b) * abs(factors.scaling)


def _check_reachable(adapters: Sequence[Adapter], target: torch.device) -> None:
    """Refuse adapters on another GPU: the kernels of one do not read what lies on another."""
    if target.type != "cuda":
        return
    own = torch.device("cuda", target.index if target.index is not None else torch.cuda.current_device())
    for adapter in adapters:
        if (there := _device_of([adapter])).type == "cuda" and there != own:
            raise UserInputError(
                f"adapter '{adapter.name}' lies on {there}, and the merge works on {own}; read it to {own} or to host memory"
            )


def _device_of(adapters: Sequence[Adapter]) -> torch.device:
    return next((f.A.device for adapter in adapters for f in adapter.factors.values()), torch.device("cpu"))
