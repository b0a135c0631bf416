# SPDX-License-Identifier: Apache-2.0
"""Runs a merge: groups modules by shape, works in batches and tiles within a workspace, cuts the result to its rank."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from vllm_merge.adapters.factors import Adapter, LoraFactors
from vllm_merge.adapters.stacking import ModuleGroup, Sources, Stack, group_modules, side_by_side, stack_group
from vllm_merge.algebra.coordinates import Coordinates, Grams, coordinates, core_coordinates, task_norm
from vllm_merge.algebra.cores import Cores
from vllm_merge.algebra.factorwise import NOT_EXACT, FactorTasks
from vllm_merge.algebra.overview import Overview
from vllm_merge.algebra.ranks import RankPolicy
from vllm_merge.algebra.tiles import Part, Tile, default_tile_entries, parts
from vllm_merge.algebra.truncation import Truncated, truncate
from vllm_merge.algebra.workspace import ModuleCost, Workspace
from vllm_merge.artifact import MergedAdapter, MergeReport
from vllm_merge.errors import MergeCancelled, MergeError, UserInputError
from vllm_merge.methods.preconditions import Context, resolve_preconditions
from vllm_merge.methods.registry import MethodSpec, default_registry
from vllm_merge.methods.resolve import ResolvedParameters, resolve_parameters

LOW_ENERGY = 0.9
CANCELLED = 1e-7  # of the largest weighted task; float32 rounding


def merge(
    adapters: Sequence[Adapter],
    *,
    merge_method: str,
    space: str | None = None,
    weights: Sequence[float | Mapping[str, float]] | None = None,
    parameters: Mapping[str, object] | None = None,
    adapter_parameters: Sequence[Mapping[str, float | Mapping[str, float]]] | None = None,
    precondition: Sequence[str | Mapping[str, object]] = (),
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
    precondition: names, or {name: parameters}, of what is done to the adapters before, in order.
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
    resolve_parameters(spec, chosen, names, weights, parameters, adapter_parameters)  # all are checked, dropped or not
    provenance = {
        "merge_method": merge_method,
        "method_version": spec.version,
        "space": chosen,
        "adapters": [{"name": adapter.name, "content_hash": adapter.known_hash} for adapter in adapters],
        "weights": None if weights is None else list(weights),
        "parameters": dict(parameters or {}),
        "adapter_parameters": None if adapter_parameters is None else [dict(mine) for mine in adapter_parameters],
        "precondition": list(precondition),
        "rank": rank if isinstance(rank, int | str) else dict(rank),
        "max_rank": max_rank,
        "seed": seed,
        "dtype": str(dtype).removeprefix("torch."),
    }
    changes = resolve_preconditions(precondition)
    zero = _zero_adapters(adapters)
    used = [index for index in range(len(adapters)) if index not in zero]

    def those(values: Sequence[Any] | None) -> list[Any] | None:
        return None if values is None else [values[index] for index in used]

    resolved = resolve_parameters(
        spec, chosen, [names[i] for i in used], those(weights), parameters, those(adapter_parameters)
    )
    target = torch.device(device) if device is not None else _device_of(adapters)
    context = Context(target, seed, workspace_bytes)
    kept: Sequence[Adapter] = [adapters[index] for index in used]
    for change in changes:
        kept = change(kept, context)
    if spec.prepare is not None:
        kept = spec.prepare(kept, context, chosen, resolved)
    job = _Job(
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
    bases = {adapter.base_model for adapter in adapters}
    return MergedAdapter(name, factors, job.report, provenance, bases.pop() if len(bases) == 1 else None)


def _zero_adapters(adapters: Sequence[Adapter]) -> set[int]:
    """Which adapters are ΔW = 0 at every module. A module of each settles nearly all; two reads of the device do."""
    modules = {index: list(adapter.factors.values()) for index, adapter in enumerate(adapters)}
    device = _device_of(adapters)
    zero = set(modules)
    for some in (slice(0, 1), slice(1, None)):
        norms = {index: [_norm(pair) for pair in modules[index][some]] for index in zero if modules[index][some]}
        if norms:
            largest = torch.stack([torch.stack(found).amax().to(device) for found in norms.values()])
            zero -= {index for index, norm in zip(norms, largest.tolist(), strict=True) if norm != 0}
    return zero


def _norm(factors: LoraFactors) -> Tensor:
    a, b = factors.A.double(), factors.B.double()
    return task_norm(a @ a.mT, b.mT @ b) * abs(factors.scaling)


def _device_of(adapters: Sequence[Adapter]) -> torch.device:
    return next((f.A.device for adapter in adapters for f in adapter.factors.values()), torch.device("cpu"))


def _own(view: Tensor) -> Tensor:
    return view.clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True, slots=True)
class _Batch:
    """Modules that are worked on at once. start: the position of the first among all modules of the merge."""

    group: ModuleGroup
    start: int
    cost: ModuleCost


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A batch on the device, with its parameters: per adapter (modules, n) float64, λ (modules,) float64.

    product: in space `factors`, the one task that its method has made of all; the coordinates then are of it.
    """

    batch: _Batch
    stack: Stack
    grams: Grams
    coordinates: Coordinates
    parameters: Mapping[str, Tensor]
    lam: Tensor
    product: Stack | None = None

    def parameters_of(self, modules: slice, dtype: torch.dtype) -> dict[str, Tensor]:
        """Per-adapter parameters as a method gets them, (modules, n, 1, 1)."""
        return {name: value[modules, :, None, None].to(dtype) for name, value in self.parameters.items()}


@dataclass
class _Job:
    """One merge, its arguments checked."""

    adapters: list[Adapter]
    spec: MethodSpec
    space: str
    parameters: ResolvedParameters
    policy: RankPolicy
    seed: int
    device: torch.device
    dtype: torch.dtype
    workspace: Workspace
    notify: Callable[[str, int, int], None]
    cancelled: Callable[[], bool]
    report: MergeReport
    overview: Overview | None

    def run(self) -> dict[str, LoraFactors]:
        """Statistics over all modules, then batch by batch: merged entries, rank, factors."""
        statistics: Any = None
        if self.spec.statistics is not None:
            passes = _JobPasses(self)
            with self._timed("statistics"):
                statistics = self.spec.statistics(passes, **self.parameters.per_recipe)
        factors: dict[str, LoraFactors] = {}
        for batch in self.batches:
            if not self._fits_side_by_side(batch.group):
                factors.update(self._merge_batch(self.prepared(batch), statistics))
                continue
            if self.overview is not None:  # which needs the singular values of the result
                dropped = list(self.report.dropped_modules)
                self._merge_batch(self.prepared(batch), statistics)
                self.report.dropped_modules = dropped
            factors.update(self._side_by_side(batch))
        conflict = getattr(statistics, "sign_conflict", None)
        if conflict is not None:
            self.report.sign_conflict = dict(zip(self.modules, conflict.tolist(), strict=True))
        if self.overview is not None:
            with self._timed("report"):
                by_module, overall = self.overview.read()
            self.report.describe(self.modules, by_module.listed(), overall.listed())
        self.report.continuation = getattr(statistics, "continuation", {})
        if self.space == "factors":
            self.report.warnings.append(NOT_EXACT)
        low = {module: kept for module, kept in self.report.energy_kept.items() if kept is not None}
        low = {module: kept for module, kept in low.items() if kept < LOW_ENERGY}
        if low:
            worst = min(low, key=low.__getitem__)
            self.report.warnings.append(
                f"{len(low)} of {len(self.modules)} modules keep under {LOW_ENERGY:.0%} of their energy at this rank, "
                f"least {low[worst]:.1%} at {worst}; a larger rank keeps more"
            )
        self.report.peak_workspace_bytes = self.workspace.peak
        return factors

    @cached_property
    def batches(self) -> list[_Batch]:
        """All modules, in batches of one shape."""
        groups = group_modules(self.adapters)
        if self.spec.coefficients is not None:
            groups = [piece for group in groups for piece in group.by_ranks()]
        costs = [ModuleCost.of(g, self.space, self.policy, whole_modules=self.spec.whole_modules) for g in groups]
        if self.spec.statistics is not None and self.spec.coefficients is None:
            self.workspace.hold_if_fits(sum(c.held * len(g.modules) for g, c in zip(groups, costs, strict=True)))
        batches: list[_Batch] = []
        start = 0
        for group, cost in zip(groups, costs, strict=True):
            alone = self.overview is None and self._fits_side_by_side(group)  # nothing is held but the result
            for piece in group.batches(len(group.modules) if alone else self.workspace.modules_at_once(cost)):
                batches.append(_Batch(piece, start, cost))
                start += len(piece.modules)
        return batches

    @cached_property
    def modules(self) -> list[str]:
        """All modules, in the order of the batches."""
        return [module for batch in self.batches for module in batch.group.modules]

    @cached_property
    def _held(self) -> dict[int, _Prepared] | None:
        """Prepared batches, kept from the first pass where a method needs several and they fit."""
        return {} if self.batches and self.workspace.held else None

    @cached_property
    def _sources(self) -> Sources | None:
        if self.device.type != "cuda":
            return None
        return Sources(self.device, self.workspace.limit, self.adapters, self._go_on)

    @cached_property
    def _on_the_fly(self) -> bool:
        """Whether the method makes the entries itself, in the GPU's kernels."""
        return self.spec.on_the_fly and self.device.type == "cuda" and self.space in ("delta", "knots")

    def _fits_side_by_side(self, group: ModuleGroup) -> bool:
        """Whether the method is a weighted sum whose terms all fit into the rank, so that no smaller one is worked out."""
        if self.spec.coefficients is None or self.space != "core" or self.policy.energy is not None:
            return False
        return self.policy.by_sum or (self.policy.limit or 0) >= group.stacked_rank

    def _side_by_side(self, batch: _Batch) -> dict[str, LoraFactors]:
        """A = [A_1; …; A_n], B = [c_1 B_1, …, c_n B_n]: exact, without a rounding but that of c_i B_i to the dtype."""
        assert self.spec.coefficients is not None
        modules, cpu = batch.group.modules, torch.device("cpu")
        self.step("merge", batch.start)
        with self._timed("factors"):
            shares = self.spec.coefficients(**self.parameters.tensors(modules, cpu), **self.parameters.per_recipe)
            shares = self._like_terms(shares * self.parameters.lambdas(modules, cpu)[:, None])
        alike: dict[tuple[bool, ...], list[int]] = {}
        for index, pattern in enumerate((shares != 0).tolist()):
            alike.setdefault(tuple(pattern), []).append(index)
        factors: dict[str, LoraFactors] = {}
        for pattern, rows in alike.items():
            used = [index for index, there in enumerate(pattern) if there]
            factors.update(self._terms_side_by_side(batch.group.of(rows), used, shares[rows][:, used]))
        return factors

    def _terms_side_by_side(self, group: ModuleGroup, used: list[int], shares: Tensor) -> dict[str, LoraFactors]:
        """Of modules that have the same terms: those of the adapters used, times their shares (modules, adapters)."""
        modules = group.modules
        if not used:
            self.report.dropped_modules += modules
            return {}
        with self._timed("factors"):
            terms, adapters = group.only(used), [self.adapters[index] for index in used]
            a, b, finite = side_by_side(terms, adapters, shares, self.device, self.dtype, self._sources)
        if not finite:
            batch = next(batch for batch in self.batches if modules[0] in batch.group.modules)
            self._check_inputs(batch, Grams.of(stack_group(batch.group, self.adapters, self.device)).norms)
            raise MergeError(f"module '{modules[0]}' or one of its shape: the merged factors do not fit {self.dtype}")
        self.report.ranks.update(dict.fromkeys(modules, terms.stacked_rank))
        self.report.energy_kept.update(dict.fromkeys(modules))
        return {m: LoraFactors(mine, its) for m, mine, its in zip(modules, a.unbind(), b.unbind(), strict=True)}

    def _like_terms(self, shares: Tensor) -> Tensor:
        """The shares (modules, n), those of adapters that are the same added up at the first of them."""
        first: dict[object, int] = {}
        for index, adapter in enumerate(self.adapters):
            same = first.setdefault(adapter.known_hash or id(adapter), index)
            if same != index:
                shares[:, same] += shares[:, index]
                shares[:, index] = 0
        return shares

    def _go_on(self) -> None:
        """Stop if that is wanted."""
        if self.cancelled():
            raise MergeCancelled("the merge was cancelled")

    def step(self, stage: str, done: int) -> None:
        """Report progress; stop if that is wanted."""
        if self.cancelled():
            raise MergeCancelled(f"the merge was cancelled ({stage}, {done} of {len(self.modules)} modules)")
        self.notify(stage, done, len(self.modules))

    def prepared(self, batch: _Batch) -> _Prepared:
        if self._held is not None and batch.start in self._held:
            return self._held[batch.start]
        self.step("prepare", batch.start)
        with self._timed("prepare"):
            stack = stack_group(batch.group, self.adapters, self.device, self._sources)
            grams = Grams.of(stack)
            self._check_inputs(batch, grams.norms)
            space = coordinates(self.space, stack, grams, singular=self.spec.entrywise)
            modules = batch.group.modules
            prepared = _Prepared(
                batch,
                stack,
                grams,
                space,
                self.parameters.tensors(modules, self.device),
                self.parameters.lambdas(modules, self.device),
            )
        self.workspace.count(batch.cost.stack * len(modules))
        if self._held is not None:
            self._held[batch.start] = prepared
        return prepared

    def _check_inputs(self, batch: _Batch, norms: Tensor) -> None:
        found = norms.tolist()
        for module, row in zip(batch.group.modules, found, strict=True):
            for adapter, norm in zip(self.adapters, row, strict=True):
                if not norm < float("inf"):
                    raise MergeError(
                        f"adapter '{adapter.name}', module '{module}': its factors hold values that are not finite; "
                        "the adapter is broken and cannot be merged"
                    )
        self.report.input_norms.update(zip(batch.group.modules, found, strict=True))

    def parts(self, prepared: _Prepared) -> Iterator[Part]:
        """What a batch is merged by."""
        limit = self.workspace.tile_entries * (16 if self._on_the_fly else 1)  # entries that are never all there
        return parts(prepared.coordinates, limit, whole=self.spec.whole_modules)

    def tile(self, prepared: _Prepared, part: Part) -> Tile:
        """What a method is given for one part of a batch."""
        space, start = prepared.coordinates, prepared.batch.start
        return Tile(
            space=self.space,
            values=space.values(part.modules, part.rows, part.cols, made=not self._on_the_fly),
            modules=slice(start + part.modules.start, start + part.modules.stop),
            entries=space.entries[part.modules],
            parameters=prepared.parameters_of(part.modules, torch.float32),
            rows=part.rows,
            cols=part.cols,
            left=space.left[part.modules],
            right=space.right[part.modules],
            slots=space.group.slots,
        )

    def cores(self, prepared: _Prepared, part: Part) -> Cores:
        """What a method of whole modules is given for one part of a batch."""
        parameters = prepared.parameters_of(part.modules, torch.float64)
        return Cores.of(prepared.coordinates, part.modules, prepared.batch.start, parameters)

    def _product(self, prepared: _Prepared, statistics: Any) -> _Prepared:
        """The batch as one task in `core`, the product of the A and the B that a method of space `factors` makes."""
        parameters = prepared.parameters_of(slice(None), torch.float64)
        tasks = FactorTasks.of(prepared.stack, self.adapters, prepared.batch.start, parameters)
        with self._timed("merge"):
            stack = tasks.product(*self.spec.apply(tasks, statistics, **parameters, **self.parameters.per_recipe))
        return replace(prepared, product=stack, coordinates=core_coordinates(stack, Grams.of(stack), False))

    def _merge_batch(self, prepared: _Prepared, statistics: Any) -> dict[str, LoraFactors]:
        if self.space == "factors":
            prepared = self._product(prepared, statistics)
        batch, space = prepared.batch, prepared.coordinates
        modules, _, rows, cols = space.shape
        tall = rows >= cols
        elects = getattr(statistics, "sign_conflict", None) is not None  # and counts itself what disagrees
        self.workspace.count(batch.cost.total * modules)

        def merged_parts() -> Iterator[tuple[Part, Tensor]]:
            for part in self.parts(prepared):
                self.step("merge", batch.start + part.modules.start)
                if self.space == "factors":
                    values = space.values(part.modules, part.rows, part.cols)[:, 0]
                else:
                    if self.spec.whole_modules:
                        tile: Tile | Cores = self.cores(prepared, part)
                    else:
                        tile = self.tile(prepared, part)
                        if self.overview is not None and not (elects or self._on_the_fly):
                            self.overview.count_signs(tile, batch.start, modules)
                    values = self.spec.apply(tile, statistics, **tile.parameters, **self.parameters.per_recipe)
                if not self.parameters.unscaled:
                    values = values * prepared.lam[part.modules, None, None].to(values.dtype)
                self._check_result(batch, part, values)
                yield part, values

        def strips_of(whole: Tensor) -> Iterator[Tensor]:
            lines = max(1, self.workspace.tile_entries // (modules * min(rows, cols)))
            for start in range(0, max(rows, cols), lines):
                self.step("truncate", batch.start)
                piece = slice(start, start + lines)
                yield whole[:, piece] if tall else whole[:, :, piece].mT

        if self.workspace.holds_merged(batch.cost):
            with self._timed("merge"):
                pieces = merged_parts()
                part, whole = next(pieces)
                if whole.shape != (modules, rows, cols):
                    first, whole = whole, torch.empty(modules, rows, cols, dtype=whole.dtype, device=self.device)
                    whole[part.modules, part.rows, part.cols] = first
                    for part, values in pieces:
                        whole[part.modules, part.rows, part.cols] = values
            strips: Callable[[], Iterator[Tensor]] = lambda: strips_of(whole)
        else:
            strips = lambda: (v if tall else v.mT for _, v in merged_parts())
        with self._timed("truncate"):
            sums = torch.tensor([sum(ranks) for ranks in batch.group.ranks], device=self.device)
            cut = truncate(strips, min(rows, cols), self.policy, sums, self.seed)
            described = cut
            if self.overview is not None and not cut.singular:
                described = truncate(strips, min(rows, cols), self.policy, sums, self.seed, singular=True)
        with self._timed("factors"):
            return self._factors(prepared, cut, described, tall)

    def _check_result(self, batch: _Batch, part: Part, values: Tensor) -> None:
        finite = values.sum((-1, -2), dtype=torch.float64).isfinite().tolist()
        for module, good in zip(batch.group.modules[part.modules], finite, strict=True):
            if not good:
                raise MergeError(f"module '{module}': the merged weight change is not finite; check weights and lambda")

    def _lifted(self, prepared: _Prepared, cut: Truncated, tall: bool) -> tuple[Tensor, Tensor]:
        """The factors of the weight change from those of the merged coordinates: (modules, d_out, k), (modules, d_in, k)."""
        space, of = prepared.coordinates, prepared.product or prepared.stack
        left, right = (cut.long, cut.short) if tall else (cut.short, cut.long)
        if space.left_transform is not None:
            left = of.B.double() @ (space.left_transform @ left.double())
        if space.right_transform is not None:
            right = of.A.mT.double() @ (space.right_transform @ right.double())
        return left, right

    def _factors(self, prepared: _Prepared, cut: Truncated, described: Truncated, tall: bool) -> dict[str, LoraFactors]:
        """The merged factors. described: the same by singular vectors, for the report."""
        modules = prepared.batch.group.modules
        left, right = self._lifted(prepared, cut, tall)
        if self.overview is not None:
            with self._timed("report"):
                seen = (left, right) if described is cut else self._lifted(prepared, described, tall)
                self.overview.add(prepared.stack, prepared.grams, *seen)
        # Singular vectors are unique up to sign: the largest entry of each column of B is made positive.
        if cut.singular:
            sign = torch.where(left.gather(1, left.abs().argmax(1, keepdim=True)) < 0, -1.0, 1.0)
            left, right = left * sign, right * sign
        b, a = left.to(self.dtype), right.to(self.dtype)
        fits = (b.isfinite().all(-1).all(-1) & a.isfinite().all(-1).all(-1)).tolist()
        factors = {}
        ranks, norms, energies = cut.ranks.tolist(), cut.norm.tolist(), cut.energy.tolist()
        exact, noise = cut.exact.tolist(), self._noise(prepared).tolist()
        for index, (module, rank) in enumerate(zip(modules, ranks, strict=True)):
            if not fits[index]:
                raise MergeError(f"module '{module}': the merged factors do not fit {self.dtype}; choose a wider dtype")
            if rank == 0 or norms[index] <= noise[index]:
                self.report.dropped_modules.append(module)
                continue
            self.report.ranks[module] = rank
            self.report.norms[module] = norms[index]
            self.report.energy_kept[module] = None if exact[index] else energies[index]
            # Copies: a module must not keep the memory of its whole batch.
            factors[module] = LoraFactors(_own(a[index, :, :rank].mT), _own(b[index, :, :rank]))
        return factors

    def _noise(self, prepared: _Prepared) -> Tensor:
        """Norm under which a result is what rounding leaves of tasks that cancel, (modules,) float64."""
        scale = prepared.grams.norms * prepared.lam.abs()[:, None]
        if "weight" in prepared.parameters:
            scale = scale * prepared.parameters["weight"].abs()
        return scale.amax(1) * CANCELLED

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        seconds = defaultdict(float, self.report.seconds)
        seconds[stage] += time.perf_counter() - start
        self.report.seconds = dict(seconds)


class _JobPasses:
    """The passes over all tiles of a job that its method's statistics ask for."""

    def __init__(self, job: _Job) -> None:
        self._job = job

    @cached_property
    def parameters(self) -> Mapping[str, Tensor]:
        """Per-adapter parameters by name, each (all modules, n) float64."""
        return self._job.parameters.tensors(self._job.modules, self._job.device)

    @cached_property
    def entries(self) -> Tensor:
        """How many entries a task has at each module, (all modules,) int64."""
        return torch.cat([self._job.prepared(batch).coordinates.entries for batch in self._job.batches])

    @cached_property
    def lambdas(self) -> Tensor:
        """λ, (all modules,) float64."""
        return self._job.parameters.lambdas(self._job.modules, self._job.device)

    @property
    def adapters(self) -> Sequence[Adapter]:
        """The adapters that are merged, in order."""
        return self._job.adapters

    @property
    def modules(self) -> Sequence[str]:
        """The names of all modules, in the order of their positions."""
        return self._job.modules

    @property
    def seed(self) -> int:
        """The seed of the merge."""
        return self._job.seed

    @property
    def on_the_fly(self) -> bool:
        """Whether tiles come without their values, for the method to make."""
        return self._job._on_the_fly

    def tiles(self) -> Iterator[Tile]:
        """Start a new pass."""
        return (self._job.tile(prepared, part) for prepared, part in self._parts())

    def cores(self) -> Iterator[Cores]:
        """Start a new pass over whole modules."""
        return (self._job.cores(prepared, part) for prepared, part in self._parts())

    def hold(self, nbytes: int) -> None:
        """Count bytes that the statistics keep until the merge ends."""
        self._job.workspace.held += nbytes

    def _parts(self) -> Iterator[tuple[_Prepared, Part]]:
        job = self._job
        for batch in job.batches:
            prepared = job.prepared(batch)
            for part in job.parts(prepared):
                job.step("statistics", batch.start + part.modules.start)
                yield prepared, part
