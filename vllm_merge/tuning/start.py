# SPDX-License-Identifier: Apache-2.0
"""What a learner begins with: the adapters of a recipe, and how the recipe merges them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from vllm_merge.adapters.factors import Adapter, LoraFactors, natural_key
from vllm_merge.engine import merge
from vllm_merge.errors import UserInputError
from vllm_merge.methods.preconditions import Context, resolve_preconditions
from vllm_merge.methods.registry import MethodSpec, default_registry
from vllm_merge.plan_runner import WORKSPACE_BYTES, read_planned, run_plan
from vllm_merge.recipe.continuation import RESUME
from vllm_merge.recipe.plan import AdapterSource, EnergyRank, Plan, Stage
from vllm_merge.recipe.resolve import evaluate, relative_depths
from vllm_merge.tuning.branches import Sum, factor_branch
from vllm_merge.tuning.model import Branch
from vllm_merge.tuning.weights import rounded


@dataclass(frozen=True)
class Start:
    """The last stage of a plan, and its inputs as adapters in memory, on `device`."""

    plan: Plan
    stage: Stage
    adapters: tuple[Adapter, ...]
    device: torch.device

    @classmethod
    def of(cls, plan: Plan, device: torch.device) -> Start:
        """Read the adapters; merge the recipes among the inputs. Raises UserInputError for what cannot be tuned."""
        if not plan.stages:
            raise UserInputError(
                f"{plan.name!r} is an adapter; there is nothing to tune without a recipe that merges several"
            )
        stage = plan.stages[-1]
        if stage.parameters.get(RESUME):
            raise UserInputError(
                f"recipe {plan.name!r} continues an earlier result, which cannot be tuned; tune one without"
            )
        names = [s.adapter if isinstance(s := item.source, AdapterSource) else s.stage for item in stage.inputs]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise UserInputError(
                f"recipe {plan.name!r} lists {', '.join(twice)} more than once; list each adapter once to tune"
            )
        order, identities = [one.name for one in plan.stages], plan.stage_identities()
        adapters = []
        for item in stage.inputs:
            if isinstance(item.source, AdapterSource):
                adapters.append(read_planned(plan.adapters[item.source.adapter]))
            else:
                earlier = plan.stages[: order.index(item.source.stage) + 1]
                merged = run_plan(
                    plan.model_copy(update={"stages": earlier, "max_rank": None, "dtype": "float32"}), report="brief"
                )
                # As in the plan itself: masks that a rule draws go by what an adapter is known as.
                known, origin = identities[item.source.stage], merged.base_model
                adapters.append(Adapter(item.source.stage, merged.factors, content_hash=known, base_model=origin))
        return cls(plan, stage, tuple(adapters), device)

    @property
    def spec(self) -> MethodSpec:
        """The recipe's merge method."""
        return default_registry().get(self.stage.merge_method)

    @cached_property
    def modules(self) -> tuple[str, ...]:
        """All modules that any adapter has, in natural order."""
        return tuple(sorted({module for adapter in self.adapters for module in adapter.factors}, key=natural_key))

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the inputs, in order."""
        return tuple(adapter.name for adapter in self.adapters)

    @property
    def is_sum(self) -> bool:
        """Whether the recipe's merge is a weighted sum of the weight changes, whatever rank it is cut to."""
        if self.spec.coefficients is None:
            return False
        return self.stage.space == "core" or self.stage.merge_method == "task_arithmetic"

    @property
    def cut(self) -> int | None:
        """The rank that a sum is cut to, where that is under Σ r_i of some module; None where nothing is cut off."""
        rank = self.stage.rank
        if isinstance(rank, str):
            return None
        limit = self.plan.max_rank if isinstance(rank, EnergyRank) else rank
        ranks = [sum(a.factors[m].rank for a in self.adapters if m in a.factors) for m in self.modules]
        return limit if limit is not None and limit < max(ranks) else None

    def parameters(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The recipe's parameters and each adapter's, as scalars or {module: value}."""
        depths = relative_depths(self.modules)

        def at(values: Mapping[str, Any]) -> dict[str, Any]:
            return {name: evaluate(value, self.modules, depths) for name, value in values.items()}

        return at(self.stage.parameters), [at(item.parameters) for item in self.stage.inputs]

    def weights(self) -> Tensor:
        """The recipe's weights, (modules, n) float64."""
        return self.table("weight")

    def table(self, parameter: str) -> Tensor:
        """A parameter of the adapters, (modules, n) float64."""
        return torch.stack([self.column(mine[parameter]) for mine in self.parameters()[1]], dim=1)

    def shares(self, weights: Tensor | None = None) -> Tensor:
        """What the sum that the recipe's merge is has for weights, λ included, (modules, n) float64; of other weights."""
        recipe, _ = self.parameters()
        own = {name: value for name, value in recipe.items() if name != "lambda"}
        assert self.spec.coefficients is not None
        share = self.spec.coefficients(weight=self.weights() if weights is None else weights, **own)
        return share * self.column(recipe["lambda"])[:, None]

    def column(self, value: Any) -> Tensor:
        """A scalar or {module: value} at every module, (modules,) float64."""
        by_module = value if isinstance(value, Mapping) else dict.fromkeys(self.modules, value)
        return torch.tensor([float(by_module[module]) for module in self.modules], dtype=torch.float64)

    def conditioned(self) -> list[Adapter]:
        """The adapters after the recipe's preconditions."""
        context = Context(self.device, self.stage.seed, WORKSPACE_BYTES)
        adapters: Any = list(self.adapters)
        for change in resolve_preconditions(self.stage.precondition):
            adapters = change(adapters, context)
        return list(adapters)

    @cached_property
    def _live(self) -> Sum | None:
        """The recipe's merge with all adapters live, where it is a sum that nothing is cut off."""
        if not self.is_sum or self.cut is not None:
            return None
        return Sum(self.conditioned(), self.modules, self.device)

    def branches(self, table: Tensor) -> Mapping[str, Branch]:
        """Those of the recipe's own method with other weights, (modules, n); merged anew where it is not a sum."""
        if self._live is not None:
            return self._live.branches(self.shares(table))
        return {name: factor_branch(pair, self.device) for name, pair in self.merged(table).items()}

    def merged(self, table: Tensor) -> Mapping[str, LoraFactors]:
        """The factors that the recipe's own method gives with other weights, (modules, n)."""
        recipe, each = self.parameters()
        for mine, column in zip(each, rounded(table).mT.tolist(), strict=True):
            mine["weight"] = dict(zip(self.modules, column, strict=True))
        rank = self.stage.rank
        return merge(
            self.adapters,
            merge_method=self.stage.merge_method,
            space=self.stage.space,
            parameters=recipe,
            adapter_parameters=each,
            precondition=self.stage.precondition,
            rank={"energy": rank.energy} if isinstance(rank, EnergyRank) else rank,
            max_rank=self.plan.max_rank,
            seed=self.stage.seed,
            device=self.device,
            report="brief",
        ).factors
