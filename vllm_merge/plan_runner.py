# SPDX-License-Identifier: Apache-2.0
"""Running a plan: stage by stage, from the adapters it names to one merged adapter."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from importlib import metadata
from typing import Any, Literal

import torch

from vllm_merge.adapters.factors import Adapter, LoraFactors
from vllm_merge.adapters.peft import read_adapter, read_each, size_of
from vllm_merge.artifact import MergedAdapter, MergeReport
from vllm_merge.engine import merge
from vllm_merge.errors import MergeError
from vllm_merge.recipe.plan import AdapterSource, EnergyRank, Plan, PlannedAdapter, Stage, StageSource
from vllm_merge.recipe.resolve import evaluate, relative_depths

WORKSPACE_BYTES = 2 << 30

LoadAdapter = Callable[[PlannedAdapter], Adapter]


def read_planned(planned: PlannedAdapter, device: torch.device | None = None) -> Adapter:
    """Read a plan's adapter from its folder to a device (default: the CPU).

    Raises UserInputError where its content is not what was planned.
    """
    return read_adapter(planned.path, planned.name, expected_hash=planned.content_hash, device=device)


def reading_device(plan: Plan, device: torch.device, workspace_bytes: int) -> torch.device:
    """Where to read a plan's adapters to: at once to where they are merged, if all of them are no more than the bytes given."""
    size = sum(size_of(planned.path) for planned in plan.adapters.values())
    return device if size <= workspace_bytes else torch.device("cpu")


def run_plan(
    plan: Plan,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    load_adapter: LoadAdapter | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
    workspace_bytes: int = WORKSPACE_BYTES,
    report: Literal["full", "brief"] = "full",
) -> MergedAdapter:
    """Run `plan` and return its result in the plan's dtype, on `device` (default: the CPU).

    dtype: where given, it must be the plan's, because the digest stands for it. load_adapter: where the adapters
    come from, one by one; by default their folders, several at a time, to `device` where all of them are no more than
    workspace_bytes. progress, cancelled and workspace_bytes are those of `vllm_merge.engine.merge`, for every stage;
    report is that of the last.
    Stages before the last are merged in float32. A plan without stages gives the adapter itself, its scaling folded.
    """
    target = torch.device(device) if device is not None else torch.device("cpu")
    wanted: torch.dtype = getattr(torch, plan.dtype)
    if dtype is not None and dtype != wanted:
        raise MergeError(f"plan {plan.artifact_name} is for {plan.dtype}, not {dtype}; make the plan for that dtype")
    planned = plan.adapters.values()
    if load_adapter is None:
        read = partial(read_planned, device=reading_device(plan, target, workspace_bytes))
        adapters = read_each(read, planned)
    else:
        adapters = list(map(load_adapter, planned))
    loaded = dict(zip(plan.adapters, adapters, strict=True))
    if plan.kind == "adapter":
        return _as_it_is(plan, loaded[plan.name], target, wanted)
    identities = plan.stage_identities()
    results: dict[str, Adapter] = {}
    for stage in plan.stages:
        last = stage is plan.stages[-1]
        merged = _run_stage(
            stage,
            [_source(item.source, loaded, results) for item in stage.inputs],
            max_rank=plan.max_rank if last else None,
            device=target,
            dtype=wanted if last else torch.float32,
            progress=progress,
            cancelled=cancelled,
            workspace_bytes=workspace_bytes,
            report=report if last else "brief",
        )
        results[stage.name] = Adapter(
            stage.name,
            merged.factors,
            content_hash=identities[stage.name],
            base_model=merged.base_model,
            metadata={"continuation": merged.report.continuation},
        )
    merged.provenance = _provenance(plan)
    return merged


def _source(
    source: AdapterSource | StageSource, loaded: Mapping[str, Adapter], results: Mapping[str, Adapter]
) -> Adapter:
    return loaded[source.adapter] if isinstance(source, AdapterSource) else results[source.stage]


def _run_stage(stage: Stage, adapters: Sequence[Adapter], **options: Any) -> MergedAdapter:
    modules = list(dict.fromkeys(module for adapter in adapters for module in adapter.factors))
    depths = relative_depths(modules)

    def at_modules(parameters: Mapping[str, Any]) -> dict[str, Any]:
        return {name: evaluate(value, modules, depths) for name, value in parameters.items()}

    return merge(
        adapters,
        merge_method=stage.merge_method,
        space=stage.space,
        parameters=at_modules(stage.parameters),
        adapter_parameters=[at_modules(item.parameters) for item in stage.inputs],
        precondition=stage.precondition,
        rank={"energy": stage.rank.energy} if isinstance(stage.rank, EnergyRank) else stage.rank,
        seed=stage.seed,
        name=stage.name,
        **options,
    )


def _as_it_is(plan: Plan, adapter: Adapter, device: torch.device, dtype: torch.dtype) -> MergedAdapter:
    factors = {}
    for module, pair in adapter.factors.items():
        b = pair.B.to(device, torch.float32) * pair.scaling
        factors[module] = LoraFactors(pair.A.to(device, dtype), b.to(dtype), embedding=pair.embedding)
    _check_finite(adapter, factors)
    report = MergeReport(
        method="none",
        space="factors",
        adapters=[adapter.name],
        ranks={module: pair.rank for module, pair in factors.items()},
        energy_kept=dict.fromkeys(factors),
    )
    return MergedAdapter(plan.name, factors, report, _provenance(plan), adapter.base_model)


def _check_finite(adapter: Adapter, factors: Mapping[str, LoraFactors]) -> None:
    """Raise MergeError where an adapter's own values are not finite, or not those of its factors in their new dtype."""
    largest = [torch.linalg.vector_norm(side, torch.inf) for pair in factors.values() for side in (pair.A, pair.B)]
    good = torch.stack(largest).isfinite().view(-1, 2).all(1)
    for module in (module for module, finite in zip(factors, good.tolist(), strict=True) if not finite):
        given = adapter.factors[module]
        if given.A.isfinite().all() and given.B.isfinite().all():
            raise MergeError(
                f"module '{module}': the factors do not fit {factors[module].A.dtype}; choose a wider dtype"
            )
        raise MergeError(
            f"adapter '{adapter.name}', module '{module}': its factors hold values that are not finite; the adapter is "
            "broken and cannot be served"
        )


def _provenance(plan: Plan) -> dict[str, object]:
    """What made the result: the plan without the folders of this machine, and the versions that matter to numbers."""
    content = plan.model_dump(mode="json", exclude={"adapters": {"__all__": {"path"}}})
    return {
        "artifact": plan.artifact_name,
        "plan": content,
        "versions": {package: _version(package) for package in ("vllm-merge", "torch")},
    }


@cache
def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # run from a source tree
        return None
