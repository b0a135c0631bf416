# SPDX-License-Identifier: Apache-2.0
"""One merge at work: its batches of modules, what a method is given of them, and the merged coordinates of each."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from vllm_merge.adapters.factors import Adapter, LoraFactors
from vllm_merge.adapters.held import held_stacks
from vllm_merge.adapters.stacking import ModuleGroup, Sources, Stack, group_modules, stack_group
from vllm_merge.algebra.coordinates import Grams, bases, coordinates, gram_pair
from vllm_merge.algebra.cores import Cores
from vllm_merge.algebra.factorwise import NOT_EXACT, FactorTasks
from vllm_merge.algebra.overview import Overview
from vllm_merge.algebra.ranks import RankPolicy
from vllm_merge.algebra.symmetric import looked_at_once
from vllm_merge.algebra.tiles import BYTES_PER_ENTRY, Part, Tile, parts
from vllm_merge.algebra.truncation import Truncated, truncate_each
from vllm_merge.algebra.workspace import ModuleCost, Workspace
from vllm_merge.artifact import MergeReport
from vllm_merge.engine import finish, side_by_side
from vllm_merge.engine.batches import Batch, Described, Merged, Prepared, runs
from vllm_merge.engine.columns import ColumnSums
from vllm_merge.engine.passes import JobPasses
from vllm_merge.errors import MergeCancelled, MergeError
from vllm_merge.methods.registry import MethodSpec
from vllm_merge.methods.resolve import ResolvedParameters

LOW_ENERGY = 0.9
TOGETHER = ("core", "knots")  # the spaces with K × K work, which is done at once for modules of any shapes


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
    unsettled: list[tuple[Tensor, Sequence[Batch], Mapping[str, LoraFactors]]] = field(default_factory=list)
    """Factors whose values may not be finite, with what will tell, not 0 where they are not, and the batches they are of."""
    _described: dict[int, Described] = field(default_factory=dict)
    _stacks: dict[int, Stack] = field(default_factory=dict)

    def run(self) -> Mapping[str, LoraFactors]:
        """Statistics over all modules, then batch by batch: merged entries, rank, factors. `settle` before they are given out."""
        statistics: Any = None
        alone = self._all_beside
        if self.spec.statistics is not None and not alone:  # those of a weighted sum only check what it checks too
            passes = JobPasses(self)
            with self.timed("statistics"):
                statistics = self.spec.statistics(passes, **self.parameters.per_recipe)
        factors: dict[str, LoraFactors] = {}
        beside: list[Batch] = []
        columns = None if alone else ColumnSums.of(self)
        for several in [self.batches] if alone else self._merged_together:
            terms_fit = side_by_side.fits(self, several[0].group)
            if not terms_fit and not (columns is not None and columns.merge(several)):
                factors.update(self._merge_batches(several, statistics))
                continue
            if self.overview is not None:  # which needs the singular values of the result
                dropped = list(self.report.dropped_modules)
                self._merge_batches(several, statistics)
                self.report.dropped_modules = dropped
            if terms_fit:
                beside += several
        found = side_by_side.merged(self, beside) if beside else {} if columns is None else columns.factors()
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
        low = {m: kept for m, kept in self.report.energy_kept.items() if kept is not None and kept < LOW_ENERGY}
        if low:
            worst = min(low, key=low.__getitem__)
            self.report.warnings.append(
                f"{len(low)} of {len(self.modules)} modules keep under {LOW_ENERGY:.0%} of their energy at this rank, "
                f"least {low[worst]:.1%} at {worst}; a larger rank keeps more"
            )
        self.report.peak_workspace_bytes = self.workspace.peak
        return {**factors, **found} if factors else found

    def settle(self) -> None:
        """Wait for a GPU, and raise MergeError where a value is not finite. Until then it works while the host does."""
        while self.unsettled:
            overflow, batches, factors = self.unsettled.pop()
            with self.timed("factors"):
                if overflow:
                    side_by_side.explain(self, batches, factors)

    @cached_property
    def batches(self) -> list[Batch]:
        """All modules, in batches of one shape."""
        passes = self.spec.statistics is not None and self.spec.coefficients is None
        if not self._all_beside and (passes or self.space in TOGETHER):
            counted = [(len(group.modules), cost) for group, cost in self._groups]
            self.workspace.hold_if_fits(*(sum(n * getattr(c, part) for n, c in counted) for part in ("held", "bare")))
        if passes and not self.spec.on_the_fly:
            self.workspace.set_aside()
        batches: list[Batch] = []
        start = 0
        for group, cost in self._groups:
            alone = self.overview is None and side_by_side.fits(self, group)  # nothing is held but the result
            count = 1 if alone else -(-len(group.modules) // self.workspace.modules_at_once(cost))
            for piece in group.batches(-(-len(group.modules) // count)):  # of one size
                batches.append(Batch(piece, start, cost))
                start += len(piece.modules)
        return batches

    @cached_property
    def _groups(self) -> tuple[tuple[ModuleGroup, ModuleCost], ...]:
        """All modules by shape, and by ranks for a method whose terms may all fit into the rank."""
        by_ranks = self.spec.coefficients is not None or self.spec.columns is not None
        groups = tuple(group_modules(self.adapters))
        return _with_costs(groups, by_ranks, self.space, self.policy, self.spec.whole_modules)

    @cached_property
    def _all_beside(self) -> bool:
        """Whether all that is made is factors side by side."""
        return self.overview is None and all(side_by_side.fits(self, group) for group, _ in self._groups)

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
        last = self.batches[-1]
        total = last.start + len(last.group.modules)
        if self.cancelled():
            raise MergeCancelled(f"the merge was cancelled ({stage}, {done} of {total} modules)")
        self.notify(stage, done, total)

    def prepared(self, batch: Batch) -> Prepared:
        """A batch made ready. Without its stack where that would have to be made anew and its coordinates need none of it."""
        self._made_known(batch)
        found = self._described[batch.start]
        stack = self._stacks.get(batch.start)
        if stack is None and found.bases.needs_stack:
            stack = self.stacked(batch)
        space = found.bases.on(batch.group, stack, found.entries)
        return Prepared(batch, stack, found.grams, space, found.parameters, found.in_float32, found.lam)

    def entries(self, batch: Batch) -> Tensor:
        """How many entries a task has at each module of a batch, (modules,) int64."""
        self._made_known(batch)
        return self._described[batch.start].entries

    def _made_known(self, batch: Batch) -> None:
        if batch.start not in self._described:
            if not self.workspace.holds:
                self._described.clear()
                self._stacks.clear()
            self._describe(next(several for several in self._together if batch in several))

    def _describe(self, together: Sequence[Batch]) -> None:
        """The K × K work on batches of any shapes, at once: on a GPU it takes as long for a few modules as for all."""
        each = []
        with self.timed("prepare"):
            for batch in together:
                self.step("prepare", batch.start)
                stack = self.stacked(batch)
                each.append(gram_pair(stack, self.workspace.scratch_modules(batch.cost.gram)))
                if self.workspace.holds_stacks or not self.workspace.holds:
                    self._stacks[batch.start] = stack
                self.workspace.count(batch.cost.stack * len(batch.group.modules), batch.cost.gram)
                del stack
            core = ModuleGroup.joined([batch.group.cored() for batch in together])
            joined = Grams.of_pairs(each, core.slots)
            # Before a GPU is waited for, which works meanwhile.
            parameters = self.parameters.tensors(core.modules, self.device)
            in_float32 = {name: value.float() for name, value in parameters.items()}
            lam = self.parameters.lambdas(core.modules, self.device)
            self.check_inputs(core.modules, joined.norms)
            self.workspace.count(sum(batch.cost.small * len(batch.group.modules) for batch in together))
            found = bases(self.space, core, joined, singular=self.spec.entrywise)
            first = 0
            for batch in together:
                modules = batch.group.modules
                piece = slice(first, first + len(modules))
                mine = found.of(piece)
                self._described[batch.start] = Described(
                    batch,
                    joined.of_some(piece),
                    mine,
                    mine.entries(batch.group, self.device),
                    {name: value[piece] for name, value in parameters.items()},
                    {name: value[piece] for name, value in in_float32.items()},
                    lam[piece],
                )
                first += len(modules)

    def stacked(self, batch: Batch) -> Stack:
        """The factors of a batch: made anew, or as a precondition has left them."""
        held = held_stacks(self.adapters)
        found = None if held is None else held.stack(batch.group, self.device)
        return found or stack_group(batch.group, self.adapters, self.device, self.sources)

    def check_inputs(self, modules: Sequence[str], norms: Tensor) -> None:
        """Raise MergeError where an adapter's norm at a module (modules, n) is not finite."""
        on_host = norms.cpu()
        if len(broken := (~on_host.isfinite()).nonzero()):
            module, adapter = broken[0].tolist()
            raise MergeError(
                f"adapter '{self.adapters[adapter].name}', module '{modules[module]}': its factors hold values that are not "
                "finite; the adapter is broken and cannot be merged"
            )
        found = on_host.tolist()
        self.report.input_norms.update(zip(modules, found, strict=True))

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

    def whole_modules(self) -> Iterator[Prepared]:
        """All modules, those together whose coordinates have one shape, as far as they fit into the workspace."""
        for several in self._together:
            each = [self.prepared(batch) for batch in several]
            joined = self._cost_of_cores(several[0].group.cored())
            yield each[0] if len(each) == 1 else Prepared.joined(each, joined)

    def cores(self, prepared: Prepared, part: Part) -> Cores:
        """What a method of whole modules is given for one part of a batch."""
        parameters = prepared.parameters_of(part.modules, torch.float64)
        return Cores.of(prepared.coordinates, part.modules, prepared.batch.start, parameters)

    @cached_property
    def _together(self) -> list[list[Batch]]:
        """The batches, those together whose coordinates have one shape and fit into the workspace with what is made of them."""
        return runs(self.batches, self._fit_together)

    @cached_property
    def _merged_together(self) -> list[list[Batch]]:
        """The batches, those together that are cut at once: whole cores as one, others as far as what is merged fits."""
        if self.space == "core" and self.spec.whole_modules:
            return self._together
        return runs(self.batches, self._fit_merged)

    def _fit_merged(self, batches: Sequence[Batch]) -> bool:
        if self.space != "knots" or self.overview is not None or not self.workspace.holds:
            return False
        return self._merged_bytes(batches) <= self.workspace.room(max(batch.cost.scratch for batch in batches))

    def _merged_bytes(self, batches: Sequence[Batch]) -> int:
        """What batches take that are merged one after the other and cut at once."""
        each = [(len(batch.group.modules), batch.cost) for batch in batches]
        if len(batches) == 1:
            return each[0][0] * each[0][1].total
        if self.space == "core":
            cores = self._cost_of_cores(batches[0].group.cored()).total
            return sum(n * cores for n, _ in each) + max(n * cost.stack for n, cost in each)
        return sum(n * cost.result for n, cost in each) + max(n * (cost.stack + cost.method) for n, cost in each)

    def _fit_together(self, batches: Sequence[Batch]) -> bool:
        if self.space not in TOGETHER or not self.workspace.holds:
            return False
        groups = [batch.group for batch in batches]
        core, *others = (group.cored() for group in groups)
        if any((other.shape, other.slots) != (core.shape, core.slots) for other in others):
            return False
        if self.overview is None and any(side_by_side.fits(self, group) for group in groups):
            return False
        # With the stack of the largest: cores are made of it, and what is cut is lifted with it.
        each = [(len(batch.group.modules), batch.cost.stack) for batch in batches]
        needed = sum(n for n, _ in each) * self._cost_of_cores(core).total + max(n * stack for n, stack in each)
        return needed <= self.workspace.room(max(batch.cost.scratch for batch in batches))

    def _cost_of_cores(self, core: ModuleGroup) -> ModuleCost:
        return ModuleCost.of(core, "core", self.policy, whole_modules=True)

    def stack(self, prepared: Prepared) -> Stack:
        """The factors of a batch."""
        return self.stacked(prepared.batch) if prepared.stack is None else prepared.stack

    def _product(self, prepared: Prepared, statistics: Any) -> Prepared:
        """The batch as one task in `core`, the product of the A and the B that a method of space `factors` makes."""
        parameters = prepared.parameters_of(slice(None), torch.float64)
        tasks = FactorTasks.of(self.stack(prepared), self.adapters, prepared.batch.start, parameters)
        with self.timed("merge"):
            stack = tasks.product(*self.spec.apply(tasks, statistics, **parameters, **self.parameters.per_recipe))
        return replace(prepared, product=stack, coordinates=coordinates("core", stack, Grams.of(stack), singular=False))

    def _merge_batches(self, batches: Sequence[Batch], statistics: Any) -> dict[str, LoraFactors]:
        """The factors of batches that are cut at once."""
        if len(batches) > 1 and self.space == "core":
            each = [self.prepared(batch) for batch in batches]
            whole = Prepared.joined(each, self._cost_of_cores(each[0].batch.group.cored()))
            merged = [self._merged(whole, statistics, list(zip(batches, each, strict=True)))]
        else:
            merged = [self._merged_alone(batch, statistics, keep=len(batches) == 1) for batch in batches]
        self.workspace.count(self._merged_bytes(batches), max(batch.cost.lifted for batch in batches))
        if finite := [one.finite for one in merged if one.finite is not None]:
            self._check_result([module for batch in batches for module in batch.group.modules], torch.cat(finite))
        lifted: list[finish.Lifted] = []
        facts: list[Tensor] = []
        for one, cut, described in self._cut(merged):
            with self.timed("factors"):
                start = 0
                for batch, known in one.of:
                    piece = slice(start, start + len(batch.group.modules))
                    known = known or self.prepared(batch)
                    lifted.append(finish.lifted(self, known, cut.of(piece), described.of(piece), one.tall))
                    start = piece.stop
                facts.append(finish.facts(cut, one.noise, lifted[-len(one.of) :]))
        with self.timed("factors"):
            return finish.read(self, lifted, facts)

    def _merged_alone(self, batch: Batch, statistics: Any, *, keep: bool) -> Merged:
        """One batch merged. keep: what is known of it is not made again, stack and all."""
        known = self.prepared(batch)
        if self.space == "factors":
            known = self._product(known, statistics)
        return self._merged(known, statistics, [(batch, known if keep else None)])

    def _merged(self, prepared: Prepared, statistics: Any, of: Sequence[tuple[Batch, Prepared | None]]) -> Merged:
        """The merged coordinates, held where there is room for them."""
        batch, space = prepared.batch, prepared.coordinates
        modules, _, rows, cols = space.shape
        tall = rows >= cols
        elects = getattr(statistics, "sign_conflict", None) is not None  # and counts itself what disagrees
        finite = torch.ones(modules, dtype=torch.bool, device=self.device)

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
                        if self.overview is not None and not elects:
                            self.overview.count_signs(tile, batch.start, modules)
                    values = looked_at_once(
                        partial(self.spec.apply, tile, statistics, **tile.parameters, **self.parameters.per_recipe)
                    )
                if not self.parameters.unscaled:
                    values = values * prepared.lam[part.modules, None, None].to(values.dtype)
                finite[part.modules] &= finish.finite(values, (-1, -2))
                yield part, values

        def checked_parts() -> Iterator[Tensor]:
            for _, values in merged_parts():
                yield values if tall else values.mT
            self._check_result(batch.group.modules, finite)

        def strips_of(whole: Tensor) -> Iterator[Tensor]:
            entries = self.workspace.tile_entries * BYTES_PER_ENTRY // 8  # widened to float64 at most
            lines = max(1, entries // (modules * min(rows, cols)))
            for start in range(0, max(rows, cols), lines):
                self.step("truncate", batch.start)
                piece = slice(start, start + lines)
                yield whole[:, piece] if tall else whole[:, :, piece].mT

        if self.workspace.holds_merged(batch.cost):
            with self.timed("merge"):
                whole: Tensor | None = None
                for part, values in merged_parts():
                    if values.shape == (modules, rows, cols):
                        whole = values
                        continue
                    if whole is None:
                        whole = torch.empty(modules, rows, cols, dtype=values.dtype, device=self.device)
                    whole[part.modules, part.rows, part.cols] = values
                assert whole is not None
                held = whole
            return Merged(lambda: strips_of(held), finite, finish.noise(prepared), min(rows, cols), tall, of)
        return Merged(checked_parts, None, finish.noise(prepared), min(rows, cols), tall, of)

    def _cut(self, merged: Sequence[Merged]) -> Iterator[tuple[Merged, Truncated, Truncated]]:
        """Each cut to its rank, and the same by singular vectors."""
        alike: dict[int, list[Merged]] = defaultdict(list)
        for one in merged:
            alike[one.short].append(one)
        for short, several in alike.items():
            to_cut = [one.to_cut() for one in several]
            cuts = truncate_each(to_cut, short, self.policy, self.seed)
            for one, mine in zip(several, to_cut, strict=True):
                with self.timed("truncate"):
                    cut = described = next(cuts)
                    if self.overview is not None and not cut.singular:
                        described = next(truncate_each([mine], short, self.policy, self.seed, singular=True))
                yield one, cut, described

    def _check_result(self, modules: Sequence[str], finite: Tensor) -> None:
        for module, good in zip(modules, finite.tolist(), strict=True):
            if not good:
                raise MergeError(f"module '{module}': the merged weight change is not finite; check weights and lambda")

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        seconds = defaultdict(float, self.report.seconds)
        seconds[stage] += time.perf_counter() - start
        self.report.seconds = dict(seconds)


@lru_cache(maxsize=16)  # of the merges that are made again and again
def _with_costs(
    groups: tuple[ModuleGroup, ...], by_ranks: bool, space: str, policy: RankPolicy, whole_modules: bool
) -> tuple[tuple[ModuleGroup, ModuleCost], ...]:
    pieces = [piece for group in groups for piece in (group.by_ranks() if by_ranks else (group,))]
    return tuple((piece, ModuleCost.of(piece, space, policy, whole_modules=whole_modules)) for piece in pieces)
