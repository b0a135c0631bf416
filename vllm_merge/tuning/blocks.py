# SPDX-License-Identifier: Apache-2.0
"""Block by block: every module takes its weight change from one of several sources, times a factor.

A source is a merge of inputs of the recipe, or one input alone (`Source.alone`). `Blocks` says which source each module takes,
and is everything that a learner has to give: `Learned(blocks=…)`. `Merger` makes of it what is scored (`branches`), and
`recipes` what is written; the two are equal up to rounding.

What is written is plain: a stage for each source that is used, its `lambda` by module, 0 wherever another source is taken (the
result then lacks these modules), and a sum of the stages. Every module has one term in that sum, so nothing is cut off by it.
Where one source is used, its merge is the recipe.

    sources = (Source("ties", "ties", {name: {} for name in start.names}, parameters={"density": 0.3}), Source.alone("sql"))
    blocks = Blocks(sources, {module: "ties" if "mlp" in module else "sql" for module in start.modules})
    merger = Merger(start)                            # kept: it keeps the merges of whole sources
    with model.attached(merger.branches(blocks)):
        value = goal.value(model)
    learned = Learned(blocks=blocks)                  # `written.Writer` does the rest
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from vllm_merge.adapters.factors import Adapter, LoraFactors
from vllm_merge.engine import merge
from vllm_merge.recipe.plan import EnergyRank
from vllm_merge.tuning.branches import factor_branch
from vllm_merge.tuning.model import Branch
from vllm_merge.tuning.start import Start
from vllm_merge.tuning.weights import filtered

LONGEST_NAME = 64


@dataclass(frozen=True)
class Source:
    """A merge by one method, without λ. name: unique among the sources of a run; a part of its stage's name.

    inputs: the parameters of each input that goes in, by its name, in the order of merging: numbers, or {module: number}.
    space: the method's default where None. parameters: those of the recipe, numbers and words;
    parameters of adapters may stand there too, for all inputs, and are numbers or {module: number} then.
    modules: those it is for, where it is for some only; it is then merged on these alone. That is for methods that look at
    each module by itself: `ties` with trim: module, not with trim: global. What parameters are elsewhere does not matter.
    """

    name: str
    merge_method: str
    inputs: Mapping[str, Mapping[str, float | Mapping[str, float]]]
    space: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    modules: tuple[str, ...] | None = None

    @classmethod
    def alone(cls, name: str) -> Source:
        """One input of the recipe as it is, after the recipe's preconditions."""
        return cls(name, "task_arithmetic", {name: {}})


@dataclass(frozen=True)
class Blocks:
    """Which source each module takes, by its name; a module that is not there does not change.

    scale: λ by module, 1 where it says nothing; where it is 0 the module does not change. Rounded as a recipe writes it.
    """

    sources: tuple[Source, ...]
    choice: Mapping[str, str]
    scale: Mapping[str, float] = field(default_factory=dict)

    def taken(self, source: Source) -> dict[str, float]:
        """{module: λ} of the modules that take this source and change."""
        mine = {module: self.scale.get(module, 1.0) for module, name in self.choice.items() if name == source.name}
        return {module: scale for module, scale in mine.items() if scale != 0}

    @property
    def used(self) -> list[Source]:
        """The sources that some module takes, in order."""
        return [source for source in self.sources if self.taken(source)]


class Merger:
    """Merges sources over the inputs of a recipe, with its preconditions, rank and seed."""

    def __init__(self, start: Start) -> None:
        self._start = start
        self._inputs = {adapter.name: adapter for adapter in start.adapters}
        self._whole: dict[str, Mapping[str, LoraFactors]] = {}

    def merged(self, source: Source) -> Mapping[str, LoraFactors]:
        """The source's factors by module. Those of a source for all modules are kept, by its name."""
        if source.modules is not None:
            return self._merge(source)
        if source.name not in self._whole:
            self._whole[source.name] = self._merge(source)
        return self._whole[source.name]

    def factors(self, blocks: Blocks) -> dict[str, LoraFactors]:
        """What the blocks make of every module that changes. Raises MergeError where a source cannot be merged."""
        found = {}
        for source in blocks.used:
            merged = self.merged(source)
            for module, scale in blocks.taken(source).items():
                if module in merged:
                    found[module] = replace(merged[module], scaling=merged[module].scaling * scale)
        return found

    def branches(self, blocks: Blocks) -> Mapping[str, Branch]:
        """The same as branches of a model."""
        return {module: factor_branch(pair, self._start.device) for module, pair in self.factors(blocks).items()}

    def _merge(self, source: Source) -> Mapping[str, LoraFactors]:
        stage = self._start.stage
        whole = [self._inputs[name] for name in source.inputs]
        adapters = [_only(adapter, source.modules) for adapter in whole]
        if not all(adapter.factors for adapter in adapters):
            adapters = whole  # a merge leaves out an input that has nothing, and methods may count their inputs
        return merge(
            adapters,
            merge_method=source.merge_method,
            space=source.space,
            parameters=source.parameters,
            adapter_parameters=[dict(mine) for mine in source.inputs.values()],
            precondition=stage.precondition,
            rank={"energy": stage.rank.energy} if isinstance(stage.rank, EnergyRank) else stage.rank,
            max_rank=self._start.plan.max_rank,
            seed=stage.seed,
            device=self._start.device,
            report="brief",
        ).factors


def _only(adapter: Adapter, modules: tuple[str, ...] | None) -> Adapter:
    """The adapter on these modules alone, still known by its hash, which random masks are drawn by."""
    if modules is None:
        return adapter
    kept = {module: adapter.factors[module] for module in modules if module in adapter.factors}
    return Adapter(adapter.name, kept, content_hash=adapter.known_hash, base_model=adapter.base_model)


def recipes(
    blocks: Blocks, modules: tuple[str, ...], name: str, own: Mapping[str, Any]
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """The stages by name, and the recipe `name` that adds them up, as a recipe file writes them; of one source, that alone.

    modules: all of the merge. own: the keys of the recipe that was learned from; its preconditions and seed go into the
    stages, its rank, its loading and the like stay.
    """
    replaced = ("merge_method", "space", "parameters", "adapters")
    kept = {key: value for key, value in own.items() if key not in replaced}
    used = blocks.used or blocks.sources[:1]  # a recipe merges something, if only with λ = 0
    if len(used) == 1:
        return {}, {**_stage(used[0], blocks, modules), **kept}
    before = {key: kept.pop(key) for key in ("precondition", "seed") if key in kept}
    stages = {
        # lazy: nobody asks for it by its name
        _stage_name(name, source, blocks): {**_stage(source, blocks, modules), **before, "load": "lazy"}
        for source in used
    }
    return stages, {"merge_method": "task_arithmetic", "adapters": [{"adapter": stage} for stage in stages], **kept}


def _stage(source: Source, blocks: Blocks, modules: tuple[str, ...]) -> dict[str, Any]:
    """The source's merge, with λ = 0 at the modules that do not take it."""
    scale = dict.fromkeys(modules, 0.0) | blocks.taken(source)
    return {
        "merge_method": source.merge_method,
        **({} if source.space is None else {"space": source.space}),
        "adapters": [_input(of, mine, modules) for of, mine in source.inputs.items()],
        "parameters": {**_written(source.parameters, modules), "lambda": filtered(scale, rest=0.0)},
    }


def _stage_name(name: str, source: Source, blocks: Blocks) -> str:
    """Both names, the first cut to fit; the source's number where its name leaves no room for that."""
    ending = f"-{source.name}"
    if len(ending) > LONGEST_NAME // 2:
        ending = f"-{blocks.sources.index(source)}"
    return name[: LONGEST_NAME - len(ending)] + ending


def _input(name: str, parameters: Mapping[str, Any], modules: tuple[str, ...]) -> dict[str, Any]:
    return {"adapter": name, **({"parameters": _written(parameters, modules)} if parameters else {})}


def _written(parameters: Mapping[str, Any], modules: tuple[str, ...]) -> dict[str, Any]:
    return {
        name: filtered({module: value.get(module) for module in modules}) if isinstance(value, Mapping) else value
        for name, value in parameters.items()
    }
