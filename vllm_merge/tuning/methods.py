# SPDX-License-Identifier: Apache-2.0
"""The methods of `vllm-merge tune`: what each learns, from what, and the learner of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from vllm_merge.adapters.factors import Adapter
from vllm_merge.errors import UserInputError
from vllm_merge.tuning.batches import Encoded
from vllm_merge.tuning.branches import Composition, Sum, Ties
from vllm_merge.tuning.data import Prompt, PromptSet
from vllm_merge.tuning.evolution import enmp, lorahub
from vllm_merge.tuning.goals import goal_of, goals_of
from vllm_merge.tuning.gradient import GradientLearner
from vllm_merge.tuning.layerwise import LAYER_GROUPS, PUBLISHED, Space
from vllm_merge.tuning.learner import Learner
from vllm_merge.tuning.lfs import LayerwiseSearch
from vllm_merge.tuning.model import TuningModel
from vllm_merge.tuning.objective import Goal
from vllm_merge.tuning.pool import Pool
from vllm_merge.tuning.regression import Regression
from vllm_merge.tuning.reinforced import AgentName, Choice, Reinforced
from vllm_merge.tuning.start import Start
from vllm_merge.tuning.statistics import RegMean, Ssr
from vllm_merge.tuning.study import SamplerName
from vllm_merge.tuning.weights import Groups, Per

ObjectiveName = Literal["entropy", "loss", "accuracy", "null_space"]
Kind = Literal["gradient", "search", "regression"]
OWNERS = {
    "--rules": ("rmm", "lfs"),
    "--agent": ("rmm",),
    "--groups": ("lfs",),
    "--sampler": ("lfs",),
    "several --objective": ("lfs",),
}
"""Which methods have an option that others do not have."""
RULES = ("ties", "dare_ties")  # that rmm merges blocks by, beside the recipe's own
ALL_PROMPTS = 1_000_000_000  # steps: a regression ends when it has seen every prompt


@dataclass(frozen=True)
class TuneMethod:
    """One method. objective, per, steps, of_each: defaults; None where the method has no such choice.

    of_each: prompts of each task in a step. keeps: whether the recipe keeps its own merge method.
    """

    name: str
    reference: str
    kind: Kind
    objective: ObjectiveName
    per: Per | None
    steps: int
    of_each: int = 4
    keeps: bool = True


METHODS: Mapping[str, TuneMethod] = {
    method.name: method
    for method in (
        TuneMethod("adamerging", "arXiv:2310.02575", "gradient", "entropy", "module", 100, keeps=False),
        TuneMethod("adamerging++", "arXiv:2310.02575", "gradient", "entropy", "module", 100),
        TuneMethod("nsc", "arXiv:2603.26317", "gradient", "null_space", "module", 100, keeps=False),
        TuneMethod("ssr", "arXiv:2606.10617", "regression", "loss", None, ALL_PROMPTS, keeps=False),
        TuneMethod("regmean", "arXiv:2212.09849", "regression", "loss", None, ALL_PROMPTS, keeps=False),
        TuneMethod("enmp", "arXiv:2604.17753", "search", "accuracy", "layer", 60),
        TuneMethod("lorahub", "arXiv:2307.13269", "search", "loss", "adapter", 40),
        TuneMethod("lfs", "arXiv:2502.04030", "search", "loss", None, 100),
        TuneMethod("rmm", "arXiv:2503.21272", "search", "accuracy", "layer", 175),
    )
}


@dataclass(frozen=True)
class Settings:
    """What a run is asked for; None where the method's own default is meant."""

    method: TuneMethod
    objective: ObjectiveName | None = None
    per: Per | None = None
    steps: int | None = None
    of_each: int | None = None
    rate: float = 0.01
    seed: int = 0
    alpha: float = 0.3
    answer_tokens: int = 64
    rules: tuple[str, ...] | None = None
    agent: AgentName | None = None
    groups: int | None = None
    sampler: SamplerName | None = None
    objectives: tuple[str, ...] = ()

    def checked(self) -> Settings:
        """With the method's defaults. Raises UserInputError for what the method does not have."""
        name = self.method.name
        if self.per is not None and self.method.per is None:
            why = "searches by --groups of layers" if name == "lfs" else "has a closed form for every module"
            raise UserInputError(f"--per {self.per}: {name} {why} and no such choice; leave it out")
        for option, value in self._options.items():
            if value and name not in OWNERS[option]:
                owners = " and ".join(OWNERS[option])
                raise UserInputError(f"{option}: is a choice of {owners}, which {name} does not have; leave it out")
        objective = self.objective or self.method.objective
        if self.method.kind == "gradient" and objective == "accuracy":
            raise UserInputError(
                f"--objective accuracy: it has no gradients, which {name} needs; take one of entropy, loss, null_space, or "
                "a method that searches: enmp, lorahub, lfs, rmm"
            )
        return Settings(
            self.method,
            objective,
            self.per or self.method.per,
            self.steps or self.method.steps,
            self.of_each or self.method.of_each,
            self.rate,
            self.seed,
            self.alpha,
            self.answer_tokens,
            self.rules or (RULES if name == "rmm" else PUBLISHED if name == "lfs" else None),
            (self.agent or "ppo") if name == "rmm" else None,
            (self.groups or LAYER_GROUPS) if name == "lfs" else None,
            (self.sampler or "tpe") if name == "lfs" else None,
            self.objectives,
        )

    @property
    def _options(self) -> dict[str, object]:
        return {
            "--rules": self.rules,
            "--agent": self.agent,
            "--groups": self.groups,
            "--sampler": self.sampler,
            "several --objective": self.objectives,
        }

    @property
    def aim(self) -> str:
        """What is made small, in words."""
        if self.objectives:
            return f"{', '.join(self.objectives)}: mean share of the start"
        return "share of answers missed" if self.objective == "accuracy" else str(self.objective)


def tune_method(name: str) -> TuneMethod:
    """The method of this name. Raises UserInputError that lists them."""
    if name not in METHODS:
        raise UserInputError(f"--method {name}: is unknown; methods: {', '.join(METHODS)}")
    return METHODS[name]


def build(
    settings: Settings, start: Start, model: TuningModel, data: PromptSet, safety: PromptSet | None
) -> tuple[Learner, list[str]]:
    """The learner of checked settings, and what is worth knowing about the data. Raises UserInputError."""
    method, notes = settings.method, []
    _check_method(method, start)
    if method.kind == "regression" or "null_space" in (settings.objective, *settings.objectives):
        data, others = data.for_adapters(start.names, f"--method {method.name}")
        notes = (
            [f"{data.path}: prompts of {', '.join(others)} are left out: no adapter has that name"] if others else []
        )
    if start.cut is not None and method.kind != "search":
        notes.append(
            f"the recipe's rank of {start.cut} is under the sum of the adapters' ranks: what is learned is uncut, what is "
            "served is cut, and the scores are of the latter"
        )
    own = all(task in start.names for task in data.tasks)  # the adapters can answer what has no answer
    needed = method.kind == "regression" or settings.objective in ("loss", "accuracy")
    if not data.answered and (needed or (own and settings.objective == "entropy")):
        data = answered_by_adapters(data, start, model, settings.answer_tokens, f"--method {method.name}")
        notes.append("the prompts without an answer got that of the adapter that their task is named after")
    if method.name == "lfs":
        space = Space(start, settings.groups or LAYER_GROUPS, settings.rules or PUBLISHED)
        goals = goals_of(settings, start, model, data, safety)
        return LayerwiseSearch(model, start, space, goals, sampler=settings.sampler or "tpe", seed=settings.seed), notes
    goal = goal_of(settings, start, model, data, safety)
    if method.kind == "regression":
        sets = [(1.0 if safety is None else settings.alpha, Encoded(data, model, answers=True))]
        if safety is not None:
            sets.append((1.0, Encoded(safety, model, answers=True)))
        regression = Regression(
            model,
            start.conditioned(),
            start.modules,
            sets,
            goal,
            start.branches(start.weights()),
            Ssr if method.name == "ssr" else RegMean,
            of_each=settings.of_each or method.of_each,
            seed=settings.seed,
        )
        return regression, notes
    groups = Groups.of(start.modules, settings.per or "module")
    if method.kind == "gradient":
        composition, weights = _composition(method, start)
        learner: Learner = GradientLearner(
            model,
            composition,
            goal,
            groups,
            weights,
            rate=settings.rate,
            of_each=settings.of_each or method.of_each,
            seed=settings.seed,
        )
        return learner, notes
    if method.name == "rmm":
        return _reinforced(settings, Pool(start, groups, settings.rules or ()), model, goal), notes
    evaluate = _evaluation(start, model, goal)
    weights = start.weights()
    if method.name == "enmp":
        return enmp(evaluate, groups, weights, _present(start.adapters, start), settings.seed), notes
    return lorahub(evaluate, groups, weights, settings.seed), notes


def answered_by_adapters(data: PromptSet, start: Start, model: TuningModel, tokens: int, why: str) -> PromptSet:
    """Every prompt without an answer with that of the adapter that its task is named after, of at most so many tokens.

    Raises UserInputError at the first such prompt of a task that is no adapter's name.
    """
    by_name = {adapter.name: adapter.factors for adapter in start.adapters}
    for prompt in data.prompts:
        if prompt.answer is None and prompt.task not in by_name:
            raise UserInputError(
                f"{data.path}:{prompt.line}: 'answer' is missing, and {why} needs one for every prompt; give it, or name as "
                f"'task' the adapter whose answer is to be taken (adapters: {', '.join(by_name)})"
            )
    model.limit(tokens)
    filled: dict[int, Prompt] = {}
    for task in data.tasks:
        open_ones = [prompt for prompt in data.of_task(task) if prompt.answer is None]
        if open_ones:
            found = model.answers(by_name[task or ""], [prompt.prompt for prompt in open_ones], lambda done: None)
            for prompt, text in zip(open_ones, found, strict=True):
                whole = len(model.tokens("", text, ends=False)[1]) < tokens
                filled[prompt.line] = replace(prompt, answer=text, ends=whole)
    return PromptSet(data.path, tuple(filled.get(prompt.line, prompt) for prompt in data.prompts), data.sha256)


def _check_method(method: TuneMethod, start: Start) -> None:
    """Refuse a recipe whose merge method is not one that this learns."""
    name, merge_method, space = method.name, start.stage.merge_method, start.stage.space
    if name == "adamerging++" and (merge_method != "ties" or space not in ("knots", "core")):
        raise UserInputError(
            f"recipe {start.plan.name!r} is {merge_method!r} in space {space!r}; adamerging++ learns the weights of `ties` in "
            "space knots or core, where a task is few numbers; change the recipe"
        )
    if name == "adamerging++" and start.stage.parameters["normalize"]:
        raise UserInputError(
            f"recipe {start.plan.name!r} takes the mean of the tasks that agree; adamerging++ learns the weights of their sum: "
            "write `normalize: false` into its parameters, and smaller weights"
        )
    if name in ("adamerging", "nsc") and not start.is_sum:
        raise UserInputError(
            f"recipe {start.plan.name!r} is {merge_method!r} in space {space!r}; {name} learns the weights of a sum: change merge_method to "
            "task_arithmetic or linear, or take a method that keeps the recipe's own: adamerging++ for ties, enmp, lorahub"
        )


def _composition(method: TuneMethod, start: Start) -> tuple[Composition, Tensor]:
    """How weights become branches, and the recipe's own weights there."""
    adapters = start.conditioned()
    if method.name != "adamerging++":
        return Sum(adapters, start.modules, start.device), start.shares()
    recipe, _ = start.parameters()
    return (
        Ties(
            adapters,
            start.modules,
            start.device,
            space="core" if start.stage.space == "core" else "knots",
            density=start.table("density"),
            trim=recipe["trim"],
            scale=start.column(recipe["lambda"]),
        ),
        start.weights(),
    )


def _evaluation(start: Start, model: TuningModel, goal: Goal) -> Callable[[Tensor], float]:
    """The goal's value for weights of the recipe's own method: live where that is a sum, merged anew where it is not."""

    def evaluate(table: Tensor) -> float:
        with model.attached(start.branches(table)):
            return goal.value(model)

    return evaluate


def _reinforced(settings: Settings, pool: Pool, model: TuningModel, goal: Goal) -> Reinforced:
    of_each = settings.of_each or settings.method.of_each

    def score(choice: Choice, subset: int | None) -> float:
        with model.attached(pool.branches(choice)):
            return goal.value(model) if subset is None else goal.value_on(model, subset, of_each, settings.seed)

    return Reinforced(
        score,
        pool,
        subsets=goal.subsets(of_each),
        planned=settings.steps or settings.method.steps,
        agent=settings.agent or "ppo",
        seed=settings.seed,
    )


def _present(adapters: tuple[Adapter, ...], start: Start) -> Tensor:
    """(modules, n) bool: which adapter has which module."""
    return torch.tensor([[module in adapter.factors for adapter in adapters] for module in start.modules])
