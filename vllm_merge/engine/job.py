# SPDX-License-Identifier: Apache-2.0
"""One merge at work: its batches of modules, what a method is given of them, and the merged coordinates of each."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from vllm_merge.adapters.factors import Adapter, LoraFactors
from vllm_merge.adapters.stacking import ModuleGroup, Sources, Stack, group_modules, stack_group
from vllm_merge.algebra.coordinates import Bases, Coordinates, Grams, bases, coordinates
from vllm_merge.algebra.cores import Cores
from vllm_merge.algebra.factorwise import NOT_EXACT, FactorTasks
from vllm_merge.algebra.overview import Overview
from vllm_merge.algebra.ranks import RankPolicy
from vllm_merge.algebra.tiles import Part, Tile, parts
from vllm_merge.algebra.truncation import Truncated, truncate
from vllm_merge.algebra.workspace import ModuleCost, Workspace
from vllm_merge.artifact import MergeReport
from vllm_merge.engine import finish, side_by_side
from vllm_merge.engine.passes import JobPasses
from vllm_merge.errors import MergeCancelled, MergeError
from vllm_merge.methods.registry import MethodSpec
from vllm_merge.methods.resolve import ResolvedParameters

LOW_ENERGY = 0.9
TOGETHER = ("core", "knots")  # the spaces with K × K work, which is done at once for modules of any shapes


@dataclass(frozen=True, slots=True)
class Batch:
    """Modules that are worked on at once. start: the position of the first among all modules of the merge."""

    group: ModuleGroup
    start: int
    cost: ModuleCost


@dataclass(frozen=True, slots=True)
class Described:
    """What the K × K work on a batch gives, and its parameters: all that is kept of it where its stack is not."""

    batch: Batch
    grams: Grams
    bases: Bases
    parameters: Mapping[str, Tensor]
    lam: Tensor


@dataclass(frozen=True, slots=True)
class Prepared:
    """A batch on the device, with its parameters: per adapter (modules, n) float64, λ (modules,) float64.

    stack: its factors; None where they are made again when they are needed.
    product: in space `factors`, the one task that its method has made of all; the coordinates then are of it.
    """

    batch: Batch
    stack: Stack | None
    grams: Grams
    coordinates: Coordinates
    parameters: Mapping[str, Tensor]
    lam: Tensor
    product: Stack | None = None

    @classmethod
    def joined(cls, several: Sequence[Prepared], cost: ModuleCost) -> Prepared:
        """Batches whose coordinates have the same rows, columns and slots, as one whose ΔW are these coordinates. cost: of them."""
        spaces = [one.coordinates for one in several]
        group = ModuleGroup.joined([space.group.cored() for space in spaces])
        left, right, entries = (
            torch.cat([getattr(space, part) for space in spaces]) for part in ("left", "right", "entries")
        )
        grams = Grams.joined([one.grams for one in several])
        first = several[0]
        return cls(
            Batch(group, first.batch.start, cost),
            None,
            grams,
            Coordinates(group, left, right, None, None, entries),
            {name: torch.cat([one.parameters[name] for one in several]) for name in first.parameters},
            torch.cat([one.lam for one in several]),
        )

    def parameters_of(self, modules: slice, dtype: torch.dtype) -> dict[str, Tensor]:
        """Per-adapter parameters as a method gets them, (modules, n, 1, 1)."""
        return {name: value[modules, :, None, None].to(dtype) for name, value in self.parameters.items()}


@dataclass
class Job:
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
    _described: dict[int, Described] = field(default_factory=dict)
    _stacks: dict[int, Stack] = field(default_factory=dict)

    def run(self) -> Mapping[str, LoraFactors]:
        """Statistics over all modules, then batch by batch: merged entries, rank, factors."""
        statistics: Any = None
        alone = self.overview is None and all(side_by_side.fits(self, batch.group) for batch in self.batches)
        if self.spec.statistics is not None and not alone:  # those of a weighted sum only check what it checks too
            passes = JobPasses(self)
            with self.timed("statistics"):
                statistics = self.spec.statistics(passes, **self.parameters.per_recipe)
        factors: dict[str, LoraFactors] = {}
        beside: list[Batch] = []
        whole = self.space == "core" and self.spec.whole_modules
        for several in self._together if whole else [[batch] for batch in self.batches]:
            if not side_by_side.fits(self, several[0].group):
                factors.update(self._merge_batches(several, statistics))
                continue
            if self.overview is not None:  # which needs the singular values of the result
                dropped = list(self.report.dropped_modules)
                self._merge_batches(several, statistics)
                self.report.dropped_modules = dropped
            beside += several
        found = side_by_side.merged(self, beside) if beside else {}
        conflict = getattr(statistics, "sign_conflict", None)
        if conflict is not None:
            self.report.sign_conflict = dict(zip(self.modules, conflict.tolist(), strict=True))
        if self.overview is not None:
            with self.timed("report"):
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
        return {**factors, **found} if factors else found

    @cached_property
    def batches(self) -> list[Batch]:
        """All modules, in batches of one shape."""
        groups = group_modules(self.adapters)
        if self.spec.coefficients is not None:
            groups = [piece for group in groups for piece in group.by_ranks()]
        costs = [ModuleCost.of(g, self.space, self.policy, whole_modules=self.spec.whole_modules) for g in groups]
        passes = self.spec.statistics is not None and self.spec.coefficients is None
        if passes or self.space in TOGETHER:
            counted = [(len(group.modules), cost) for group, cost in zip(groups, costs, strict=True)]
            self.workspace.hold_if_fits(*(sum(n * getattr(c, part) for n, c in counted) for part in ("held", "bare")))
        batches: list[Batch] = []
        start = 0
        for group, cost in zip(groups, costs, strict=True):
            alone = self.overview is None and side_by_side.fits(self, group)  # nothing is held but the result
            for piece in group.batches(len(group.modules) if alone else self.workspace.modules_at_once(cost)):
                batches.append(Batch(piece, start, cost))
                start += len(piece.modules)
        return batches

    @cached_property
    def modules(self) -> list[str]:
        """All modules, in the order of the batches."""
        return [module for batch in self.batches for module in batch.group.modules]

    @cached_property
    def sources(self) -> Sources | None:
        if self.device.type != "cuda":
            return None
        cancelled = self.cancelled  # not self: a cycle would keep what is held here until Python looks for cycles

        def go_on() -> None:
            if cancelled():
                raise MergeCancelled("the merge was cancelled")

        return Sources(self.device, self.workspace.limit, self.adapters, go_on)

    @cached_property
    def on_the_fly(self) -> bool:
        """Whether the method makes the entries itself, in the GPU's kernels."""
        return self.spec.on_the_fly and self.device.type == "cuda" and self.space in ("delta", "knots")

    def step(self, stage: str, done: int) -> None:
        """Report progress; stop if that is wanted."""
        if self.cancelled():
            raise MergeCancelled(f"the merge was cancelled ({stage}, {done} of {len(self.modules)} modules)")
        self.notify(stage, done, len(self.modules))

    def prepared(self, batch: Batch) -> Prepared:
        """A batch made ready. Without its stack where that would have to be made anew and its coordinates need none of it."""
        if batch.start not in self._described:
            if not self.workspace.holds:
                self._described.clear()
                self._stacks.clear()
            self._describe(next(several for several in self._together if batch in several))
        found = self._described[batch.start]
        stack = self._stacks.get(batch.start)
        if stack is None and found.bases.needs_stack:
            stack = self._stacked(batch)
        space = found.bases.on(batch.group, stack, self.device)
        return Prepared(batch, stack, found.grams, space, found.parameters, found.lam)

    def _describe(self, together: Sequence[Batch]) -> None:
        """The K × K work on batches of any shapes, at once: on a GPU it takes as long for a few modules as for all."""
        each = []
        with self.timed("prepare"):
            for batch in together:
                self.step("prepare", batch.start)
                stack = self._stacked(batch)
                each.append(Grams.of(stack))
                self.check_inputs(batch, each[-1].norms)
                if self.workspace.holds_stacks or not self.workspace.holds:
                    self._stacks[batch.start] = stack
                self.workspace.count(batch.cost.stack * len(batch.group.modules))
            found = bases(
                self.space,
                ModuleGroup.joined([batch.group.cored() for batch in together]),
                Grams.joined(each),
                singular=self.spec.entrywise,
            )
            first = 0
            for batch, grams in zip(together, each, strict=True):
                modules = batch.group.modules
                self._described[batch.start] = Described(
                    batch,
                    grams,
                    found.of(slice(first, first + len(modules))),
                    self.parameters.tensors(modules, self.device),
                    self.parameters.lambdas(modules, self.device),
                )
                first += len(modules)

    def _stacked(self, batch: Batch) -> Stack:
        return stack_group(batch.group, self.adapters, self.device, self.sources)

    def check_inputs(self, batch: Batch, norms: Tensor) -> None:
        found = norms.tolist()
        for module, row in zip(batch.group.modules, found, strict=True):
            for adapter, norm in zip(self.adapters, row, strict=True):
                if not norm < float("inf"):
                    raise MergeError(
                        f"adapter '{adapter.name}', module '{module}': its factors hold values that are not finite; "
                        "the adapter is broken and cannot be merged"
                    )
        self.report.input_norms.update(zip(batch.group.modules, found, strict=True))

    def parts(self, prepared: Prepared) -> Iterator[Part]:
        """What a batch is merged by."""
        limit = self.workspace.tile_entries * (16 if self.on_the_fly else 1)  # entries that are never all there
        return parts(prepared.coordinates, limit, whole=self.spec.whole_modules)

    def tile(self, prepared: Prepared, part: Part) -> Tile:
        """What a method is given for one part of a batch."""
        space, start = prepared.coordinates, prepared.batch.start
        return Tile(
            space=self.space,
            values=space.values(part.modules, part.rows, part.cols, made=not self.on_the_fly),
            modules=slice(start + part.modules.start, start + part.modules.stop),
            entries=space.entries[part.modules],
            parameters=prepared.parameters_of(part.modules, torch.float32),
            rows=part.rows,
            cols=part.cols,
            left=space.left[part.modules],
            right=space.right[part.modules],
            slots=space.group.slots,
        )

    def cores(self, prepared: Prepared, part: Part) -> Cores:
        """What a method of whole modules is given for one part of a batch."""
        parameters = prepared.parameters_of(part.modules, torch.float64)
        return Cores.of(prepared.coordinates, part.modules, prepared.batch.start, parameters)

    @cached_property
    def _together(self) -> list[list[Batch]]:
        """The batches, those together whose coordinates have one shape and fit into the workspace with what is made of them."""
        found: list[list[Batch]] = []
        for batch in self.batches:
            if found and self.workspace.holds and self.space in TOGETHER and self._fit_together([*found[-1], batch]):
                found[-1].append(batch)
            else:
                found.append([batch])
        return found

    def _fit_together(self, batches: Sequence[Batch]) -> bool:
        groups = [batch.group for batch in batches]
        core, *others = (group.cored() for group in groups)
        if any((other.shape, other.slots) != (core.shape, core.slots) for other in others):
            return False
        if self.overview is None and any(side_by_side.fits(self, group) for group in groups):
            return False
        return sum(len(group.modules) for group in groups) <= self.workspace.modules_at_once(self._cost_of_cores(core))

    def _cost_of_cores(self, core: ModuleGroup) -> ModuleCost:
        return ModuleCost.of(core, "core", self.policy, whole_modules=True)

    def stack(self, prepared: Prepared) -> Stack:
        """The factors of a batch."""
        return self._stacked(prepared.batch) if prepared.stack is None else prepared.stack

    def _product(self, prepared: Prepared, statistics: Any) -> Prepared:
        """The batch as one task in `core`, the product of the A and the B that a method of space `factors` makes."""
        parameters = prepared.parameters_of(slice(None), torch.float64)
        tasks = FactorTasks.of(self.stack(prepared), self.adapters, prepared.batch.start, parameters)
        with self.timed("merge"):
            stack = tasks.product(*self.spec.apply(tasks, statistics, **parameters, **self.parameters.per_recipe))
        return replace(prepared, product=stack, coordinates=coordinates("core", stack, Grams.of(stack), singular=False))

    def _merge_batches(self, batches: Sequence[Batch], statistics: Any) -> dict[str, LoraFactors]:
        """The factors of batches that are merged as one."""
        parts = [self.prepared(batch) for batch in batches]
        if self.space == "factors":
            parts = [self._product(one, statistics) for one in parts]
        whole = parts[0]
        if len(parts) > 1:
            whole = Prepared.joined(parts, self._cost_of_cores(whole.batch.group.cored()))
        cut, described, tall = self._cut(whole, statistics)
        factors: dict[str, LoraFactors] = {}
        start = 0
        with self.timed("factors"):
            for one in parts:
                piece = slice(start, start + len(one.batch.group.modules))
                self.workspace.count(one.batch.cost.total * (piece.stop - start))
                factors.update(finish.factors(self, one, cut.of(piece), described.of(piece), tall))
                start = piece.stop
        return factors

    def _cut(self, prepared: Prepared, statistics: Any) -> tuple[Truncated, Truncated, bool]:
        """The merged coordinates cut to their rank, the same by singular vectors, and whether rows are their long side."""
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
                        if self.overview is not None and not (elects or self.on_the_fly):
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
            with self.timed("merge"):
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
        with self.timed("truncate"):
            sums = torch.tensor([sum(ranks) for ranks in batch.group.ranks], device=self.device)
            cut = truncate(strips, min(rows, cols), self.policy, sums, self.seed)
            described = cut
            if self.overview is not None and not cut.singular:
                described = truncate(strips, min(rows, cols), self.policy, sums, self.seed, singular=True)
        return cut, described, tall

    def _check_result(self, batch: Batch, part: Part, values: Tensor) -> None:
        finite = values.sum((-1, -2), dtype=torch.float64).isfinite().tolist()
        for module, good in zip(batch.group.modules[part.modules], finite, strict=True):
            if not good:
                raise MergeError(f"module '{module}': the merged weight change is not finite; check weights and lambda")

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        seconds = defaultdict(float, self.report.seconds)
        seconds[stage] += time.perf_counter() - start
        self.report.seconds = dict(seconds)
