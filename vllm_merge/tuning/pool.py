# SPDX-License-Identifier: Apache-2.0
"""What a block of the model may be: as the recipe merges it, as another rule merges it, or as one adapter has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

import torch
import yaml

from vllm_merge.adapters.factors import LoraFactors
from vllm_merge.algebra.coordinates import task_norm
from vllm_merge.errors import MergeError, UserInputError
from vllm_merge.methods.registry import default_registry
from vllm_merge.recipe.problems import listed
from vllm_merge.recipe.yaml_tree import MAX_BYTES
from vllm_merge.tuning.blocks import Blocks, Merger, Source, recipes
from vllm_merge.tuning.model import Branch
from vllm_merge.tuning.start import Start
from vllm_merge.tuning.weights import DECIMALS, Groups

PUBLISHED: Mapping[str, Mapping[str, Any]] = {
    "ties": {"density": 0.3},
    "dare_linear": {"density": 0.66},
    "dare_ties": {"density": 0.66},
}
"""The parameters with which the code of arXiv:2503.21272 merges; other rules have their own defaults."""


class Pool:
    """The sources, the recipe's own merge first, then the rules', then each adapter; and candidates made of them.

    Rules need a λ of their own to be of use. So each rule's whole merge gets the one λ that makes it as large as the recipe's
    merge is, in the Frobenius norm over all modules. An adapter alone has λ = 1.
    """

    def __init__(self, start: Start, groups: Groups, rules: Sequence[str]) -> None:
        """Merges every source.

        Raises UserInputError for a rule that is unknown or cannot merge these adapters, and where a recipe of all sources
        and blocks would be too large.
        """
        self._groups, self._modules = groups, start.modules
        recipe, each = start.parameters()
        known = start.spec.defaults(per_adapter=True) | start.spec.defaults(per_adapter=False)
        inputs = {name: _told(mine, known) for name, mine in zip(start.names, each, strict=True)}
        parameters = _told({name: value for name, value in recipe.items() if name != "lambda"}, known)
        taken = set(start.names)
        own = Source(
            _free(start.stage.merge_method, taken), start.stage.merge_method, inputs, start.stage.space, parameters
        )
        merged = [_source(rule, inputs, taken) for rule in rules]
        self.sources = (own, *merged, *(Source.alone(name) for name in start.names))
        merger, rows = Merger(start), zip(start.modules, start.column(recipe["lambda"]).tolist(), strict=True)
        self._scales = [{module: round(value, DECIMALS) for module, value in rows}]
        size = _size(merger.merged(own), self._scales[0])
        for source in self.sources[1:]:
            scale = 1.0
            if source in merged:
                try:
                    found = _size(merger.merged(source), None)
                except MergeError as error:
                    raise UserInputError(f"--rules {source.merge_method}: {error}") from None
                scale = round(size / found, DECIMALS) if found > 0 else 1.0
            self._scales.append(dict.fromkeys(start.modules, scale))
        self._branches = [
            merger.branches(Blocks(self.sources, dict.fromkeys(start.modules, source.name), scale))
            for source, scale in zip(self.sources, self._scales, strict=True)
        ]
        self._check_size(start)

    def _check_size(self, start: Start) -> None:
        every = self.blocks([group % len(self.sources) for group in range(self.groups)])
        stages, last = recipes(every, self._modules, start.plan.name, {})
        size = len(yaml.safe_dump({**stages, "recipe": last}, default_flow_style=None).encode())
        if size > MAX_BYTES // 2:
            raise UserInputError(
                f"the recipe could have {size:,} bytes, and a recipe file has at most {MAX_BYTES:,}; choose a coarser --per, "
                "or fewer --rules"
            )

    @property
    def groups(self) -> int:
        """How many blocks there are."""
        return len(self._groups.names)

    def _by_module(self, choice: Sequence[int]) -> dict[str, int]:
        return {module: choice[group] for module, group in zip(self._modules, self._groups.index.tolist(), strict=True)}

    def blocks(self, choice: Sequence[int]) -> Blocks:
        """What a recipe is written from. choice: the source of each group."""
        taken = self._by_module(choice)
        names = {module: self.sources[source].name for module, source in taken.items()}
        return Blocks(self.sources, names, {module: self._scales[source][module] for module, source in taken.items()})

    def words(self, choice: Sequence[int]) -> str:
        """Which blocks come from which source: `ties: 0, 1; sql: 2 (of model.layers)`."""
        words = [name.rstrip(".").split(".") for name in self._groups.names]
        same = (
            list(takewhile(lambda column: len(set(column)) == 1, zip(*words, strict=False))) if len(words) > 1 else []
        )
        names, common = [".".join(name[len(same) :]) for name in words], ".".join(column[0] for column in same)
        taken = {
            source.name: [name for name, index in zip(names, choice, strict=True) if index == number]
            for number, source in enumerate(self.sources)
        }
        found = "; ".join(f"{name}: {listed(groups)}" for name, groups in taken.items() if groups)
        return f"{found} (of {common})" if common else found

    def branches(self, choice: Sequence[int]) -> dict[str, Branch]:
        """The same as branches of a model: of the modules that the chosen source changes."""
        found = {module: self._branches[source].get(module) for module, source in self._by_module(choice).items()}
        return {module: branch for module, branch in found.items() if branch is not None}


def _source(rule: str, inputs: Mapping[str, Mapping[str, Any]], taken: set[str]) -> Source:
    """A rule with the recipe's weights."""
    default_registry().get(rule)  # unknown names are said with the nearest one
    kept = {name: {"weight": mine["weight"]} if "weight" in mine else {} for name, mine in inputs.items()}
    return Source(_free(rule, taken), rule, kept, parameters=PUBLISHED.get(rule, {}))


def _told(parameters: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """Those that are not the defaults anyway."""
    return {name: value for name, value in parameters.items() if value != known.get(name)}


def _free(name: str, taken: set[str]) -> str:
    """The name, with as many dashes as make it nobody else's."""
    while name in taken:
        name += "-"
    taken.add(name)
    return name


def _size(factors: Mapping[str, LoraFactors], scale: Mapping[str, float] | None) -> float:
    """‖λ ΔW‖ over all modules."""
    squares = [0.0]
    for module, pair in factors.items():
        a, b = pair.A.double(), pair.B.double()
        norm = float(task_norm(a @ a.mT, b.mT @ b)) * abs(pair.scaling) * (1.0 if scale is None else abs(scale[module]))
        squares.append(norm**2)
    return float(torch.tensor(squares, dtype=torch.float64).sum().sqrt())
