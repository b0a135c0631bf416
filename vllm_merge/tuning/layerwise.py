# SPDX-License-Identifier: Apache-2.0
"""The candidates of LFS (arXiv:2502.04030): for each group of layers and kind of module, a rule and its parameters.

Published for whole models, with task arithmetic, TIES, SLERP and linear merging. Of adapters a mean shrinks what they do, and so
`linear` and `slerp` have weights that are not normalised, and TIES sums the tasks that agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import yaml

from vllm_merge.errors import UserInputError
from vllm_merge.recipe.yaml_tree import MAX_BYTES
from vllm_merge.tuning.blocks import Blocks, Source, recipes
from vllm_merge.tuning.start import Start
from vllm_merge.tuning.weights import DECIMALS, kind_of, layer_of

LAYER_GROUPS = 4
ATTENTION, MLP, OTHER = "attention", "mlp", "other"
_KINDS = {ATTENTION: ("attn", "attention"), MLP: ("mlp", "ffn", "feed_forward", "expert", "moe")}
NONE = "none"


@dataclass(frozen=True)
class Range:
    """What a number may be, and what it is in the first candidates."""

    low: float
    high: float
    first: float


class Chooser(Protocol):
    """Where the values of a candidate come from."""

    def suggest_categorical(self, name: str, choices: Sequence[str]) -> Any: ...

    def suggest_float(self, name: str, low: float, high: float) -> float: ...


@dataclass(frozen=True)
class Rule:
    """A way to merge the modules of a cell. merge_method: None for no change at all.

    shared: parameters that all inputs have in common; each: those that every input has of its own; scale: λ.
    """

    merge_method: str | None
    space: str | None = None
    fixed: Mapping[str, Any] = field(default_factory=dict)
    shared: Mapping[str, Range] = field(default_factory=dict)
    each: Mapping[str, Range] = field(default_factory=dict)
    scale: Range | None = None


def rules_for(inputs: int) -> dict[str, Rule]:
    """All rules for so many inputs, by name: the published ones come first."""
    scale, weight = Range(0.0, 2.0, 1.0), Range(0.0, 2.0, 1.0)
    even = inputs**-0.5  # of tasks that have nothing in common, as long as one of them
    slerp = Rule("multislerp", fixed={"normalize": False}, each={"weight": Range(0.0, 2 * even, even)})
    return {
        "task_arithmetic": Rule("task_arithmetic", scale=scale),
        "ties": Rule(
            "ties", "core", {"trim": "module", "normalize": False}, {"density": Range(0.05, 1.0, 0.3)}, scale=scale
        ),
        "slerp": Rule("slerp", shared={"t": Range(0.0, 1.0, 0.5)}, scale=scale) if inputs == 2 else slerp,
        "linear": Rule("linear", fixed={"normalize": False}, each={"weight": weight}),
        "tsv_m": Rule("tsv_m", scale=scale),
        "wudi": Rule("wudi", scale=scale),
        NONE: Rule(None),
    }


PUBLISHED = ("task_arithmetic", "ties", "slerp", "linear")
RULES = tuple(rules_for(2))


@dataclass(frozen=True)
class Cell:
    """Modules of one kind in neighbouring layers."""

    name: str
    modules: tuple[str, ...]


def cells_of(modules: Sequence[str], groups: int) -> tuple[Cell, ...]:
    """Layers in so many groups of neighbours, as even as they can be, times kinds of modules; modules of no layer are one."""
    layers = list(dict.fromkeys(layer_of(module) for module in modules if layer_of(module) != module))
    count = min(groups, len(layers))
    group = {layer: index * count // len(layers) for index, layer in enumerate(layers)}
    found: dict[tuple[int, str], list[str]] = {}
    for module in modules:
        found.setdefault((group.get(layer_of(module), count), _kind(module)), []).append(module)
    stacks = {_stack_and_number(layer)[0] for layer in layers}
    return tuple(Cell(_title(kind, mine, len(stacks) > 1), tuple(mine)) for (_, kind), mine in sorted(found.items()))


def _kind(module: str) -> str:
    name = kind_of(module).lower()
    return next((kind for kind, parts in _KINDS.items() if any(part in name for part in parts)), OTHER)


def _stack_and_number(layer: str) -> tuple[str, str]:
    """`model.layers` and `3` of `model.layers.3.`"""
    stack, _, number = layer.rstrip(".").rpartition(".")
    return stack, number


def _title(kind: str, modules: Sequence[str], in_full: bool) -> str:
    """By the first and the last layer; in full where a model has several stacks of layers."""
    layers = [layer_of(module) for module in modules if layer_of(module) != module]
    if not layers:
        return ", ".join(modules)
    first, last = (one.rstrip(".") if in_full else _stack_and_number(one)[1] for one in (layers[0], layers[-1]))
    return f"layer {first}, {kind}" if first == last else f"layers {first}–{last}, {kind}"


def _by_module(values: Mapping[Cell, float | None]) -> dict[str, float]:
    """As a recipe writes it, without the cells that have no value."""
    return {m: round(v, DECIMALS) for cell, v in values.items() if v is not None for m in cell.modules}


class Space:
    """All candidates for a recipe. rules: the names of those that may be chosen."""

    def __init__(self, start: Start, groups: int, rules: Sequence[str]) -> None:
        """Raises UserInputError where a rule is unknown, or what would be written is too long for a recipe file."""
        if unknown := [name for name in rules if name not in RULES]:
            raise UserInputError(f"--rules: {unknown[0]} is unknown; rules: {', '.join(RULES)}")
        if not set(rules) - {NONE}:
            raise UserInputError(f"--rules: gives nothing that merges; add one of {', '.join(RULES[:-1])}")
        known = rules_for(len(start.adapters))
        self._start, self._rules = start, {name: known[name] for name in dict.fromkeys(rules)}
        self.cells = cells_of(start.modules, groups)
        self._check()

    def _check(self) -> None:
        """Refuse what would be too long where it has a stage of each rule, and otherwise the rule of most numbers."""
        longest, *others = sorted(self._rules, key=lambda name: -len(self._rules[name].each))
        names = [longest, *others] + [longest] * len(self.cells)
        chosen = {cell.name: name for cell, name in zip(self.cells, names, strict=False)}
        values = {name: 1 + index / 10**DECIMALS for index, name in enumerate(self._names(chosen))}
        stages, last = recipes(self.blocks({**chosen, **values}), self._start.modules, self._start.plan.name, {})
        size = len(yaml.safe_dump({**stages, "recipe": last}, default_flow_style=None).encode())
        room = MAX_BYTES // 2  # beside the adapters and what the recipe is made of
        if size > room:
            raise UserInputError(
                f"--groups: the recipe's stages could have {size:,} bytes, and a recipe file has room for {room:,}; give fewer "
                "groups, or fewer adapters"
            )

    @cached_property
    def first(self) -> list[dict[str, Any]]:
        """The first candidates: each rule everywhere, and its parameters in the middle of what is usual."""
        return [
            {cell.name: name for cell in self.cells}
            | {key: one.first for cell in self.cells for key, one in self._ranges(cell, name).items()}
            for name, rule in self._rules.items()
            if rule.merge_method is not None
        ]

    def _names(self, chosen: Mapping[str, str]) -> list[str]:
        return [key for cell in self.cells for key in self._ranges(cell, chosen[cell.name])]

    def _keys(self, rule: Rule, cell: Cell | None = None) -> dict[str, Range]:
        """The numbers of a rule by what they are called; in a cell, without those of adapters that have nothing there."""
        own = {
            f"{parameter} {adapter.name}": one
            for parameter, one in rule.each.items()
            for adapter in self._start.adapters
            if cell is None or any(module in adapter.factors for module in cell.modules)
        }
        return {**rule.shared, **own, **({} if rule.scale is None else {"lambda": rule.scale})}

    def _ranges(self, cell: Cell, name: str) -> dict[str, Range]:
        return {f"{cell.name}: {name} {key}": one for key, one in self._keys(self._rules[name], cell).items()}

    def draw(self, chooser: Chooser) -> dict[str, Any]:
        """The values of a candidate."""
        values: dict[str, Any] = {}
        for cell in self.cells:
            name = chooser.suggest_categorical(cell.name, list(self._rules))
            values[cell.name] = name
            for key, one in self._ranges(cell, name).items():
                values[key] = chooser.suggest_float(key, one.low, one.high)
        return values

    def blocks(self, values: Mapping[str, Any]) -> Blocks:
        """What a candidate is, its numbers as a recipe writes them."""
        sources: list[Source] = []
        choice: dict[str, str] = {}
        scale: dict[str, float] = {}
        for name, rule in self._rules.items():
            mine = [cell for cell in self.cells if values[cell.name] == name]
            if rule.merge_method is None or not mine:
                continue
            numbers = {
                key: _by_module({cell: values.get(f"{cell.name}: {name} {key}") for cell in mine})
                for key in self._keys(rule)
            }
            each = {
                adapter.name: {p: found for p in rule.each if (found := numbers[f"{p} {adapter.name}"])}
                for adapter in self._start.adapters
            }
            shared = {parameter: numbers[parameter] for parameter in rule.shared}
            modules = tuple(module for cell in mine for module in cell.modules)
            sources.append(Source(name, rule.merge_method, each, rule.space, {**rule.fixed, **shared}, modules))
            choice |= dict.fromkeys(modules, name)
            scale |= numbers.get("lambda", {})
        return Blocks(tuple(sources), choice, scale)

    def words(self, values: Mapping[str, Any]) -> list[str]:
        """A candidate, a line for each cell."""
        lines = []
        for cell in self.cells:
            head = f"{cell.name}: {values[cell.name]} "
            numbers = [f"{key.removeprefix(head)} {value:.4g}" for key, value in values.items() if key.startswith(head)]
            lines.append(f"{cell.name}: {values[cell.name]}{' (' + ', '.join(numbers) + ')' if numbers else ''}")
        return lines
