# SPDX-License-Identifier: Apache-2.0
"""The candidates of a search: methods × spaces × parameters, spread evenly by a seeded low-discrepancy sequence."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_merge.errors import UserInputError
from vllm_merge.methods.registry import MethodRegistry, MethodSpec
from vllm_merge.recipe.adhoc import MAX_NAME, PREFIX
from vllm_merge.recipe.problems import listed
from vllm_merge.search.evidence import evidence, shares
from vllm_merge.search.ranges import SIZE, SIZES, WEIGHT, WEIGHTS, Dimension, check, of_schema

LAMBDA = "lambda"


@dataclass(frozen=True)
class Arm:
    """A merge method in a space, how often it is tried, and what is searched in it. size: where its results are begun with."""

    method: str
    space: str
    share: float
    size: float
    dimensions: Mapping[str, Dimension]
    weighs: bool

    @property
    def name(self) -> str:
        return f"{self.method} in {self.space}"


@dataclass(frozen=True)
class Candidate:
    """number: from 0. size: of the result, 1 as large as the adapters together; None where λ was given."""

    number: int
    recipe: Mapping[str, Any]
    size: float | None = None

    @property
    def method(self) -> str:
        return str(self.recipe["merge_method"])

    @property
    def name(self) -> str:
        """The recipe as a model name, which any server of merges takes."""
        return as_name(self.recipe)

    @property
    def settings(self) -> str:
        """Everything but method, space and adapters, for people: size=1.2 density=0.3 sql=0.8."""
        weights = {i["adapter"]: i["parameters"][WEIGHT] for i in self.recipe["adapters"] if "parameters" in i}
        words = {**self.recipe.get("parameters", {}), **weights}
        if self.recipe.get("rank", "auto") != "auto":
            words["rank"] = self.recipe["rank"]
        return " ".join(f"{key}={_word(value)}" for key, value in words.items())


@dataclass(frozen=True)
class Space:
    """What is searched. parameters: of the command line; they take the place of what schemas say.

    methods: None for every one that merges weight changes. spaces: None for each method's default, or with `auto` the recorded.
    """

    adapters: Sequence[str]
    methods: Sequence[str] | None = None
    spaces: Sequence[str] | None = None
    parameters: Mapping[str, Dimension] = field(default_factory=dict)
    ranks: Sequence[int | str] = ("auto",)
    auto: bool = False
    seed: int = 0

    def arms(self, registry: MethodRegistry) -> list[Arm]:
        """Every method and space of the search. Raises UserInputError where there are none, or a parameter is no one's."""
        rows = evidence() if self.auto else ()
        known = {(row.method, row.space): row for row in rows}
        often = shares(rows)
        names = self.methods
        if names is None:
            names = list(dict.fromkeys(row.method for row in rows)) if self.auto else registry.names()
        specs = [spec for spec in map(registry.get, names) if self.methods is not None or spec.exact]
        specs = [spec for spec in specs if spec.most_adapters is None or len(self.adapters) <= spec.most_adapters]
        usual = sum(often.values()) / len(often) if often else 1.0  # of what was not recorded
        arms = []
        for spec in specs:
            for space in self._spaces(spec, [space for method, space in known if method == spec.name]):
                row = known.get((spec.name, space))
                share = often.get((spec.name, space), usual)
                arms.append(
                    Arm(
                        spec.name,
                        space,
                        share,
                        row.size if row is not None else 1.0,
                        self._dimensions(spec),
                        any(parameter.name == WEIGHT for parameter in spec.parameters),
                    )
                )
        if not arms:
            raise UserInputError(
                f"no merge method of these takes {len(self.adapters)} adapters in these spaces; give other --methods or --spaces"
            )
        used = {name for arm in arms for name in arm.dimensions} | {SIZE, LAMBDA, WEIGHT}
        for name in self.parameters:
            if name not in used:
                raise UserInputError(
                    f"--parameter {name}: no method of this search has it (they have: {listed(sorted(used))})"
                )
        return arms

    def _spaces(self, spec: MethodSpec, recorded: Sequence[str]) -> list[str]:
        if self.spaces is not None:
            return [space for space in spec.spaces if space in self.spaces]
        return list(recorded) or [spec.default_space]

    def _dimensions(self, spec: MethodSpec) -> dict[str, Dimension]:
        found: dict[str, Dimension] = {}
        for parameter in spec.parameters:
            if parameter.name in self.parameters:
                given = check(parameter.name, self.parameters[parameter.name], spec.parameters)
                if parameter.name not in (WEIGHT, LAMBDA):
                    found[parameter.name] = given
            elif (dimension := of_schema(parameter)) is not None:
                found[parameter.name] = dimension
        return found

    def draw(self, arms: Sequence[Arm], count: int) -> list[tuple[Arm, Candidate]]:
        """`count` candidates, each with λ = 1 until its size is known (`scaled`).

        The first of an arm has every default. Every second one leaves the adapters' weights alike.
        """
        order = turns([arm.share for arm in arms], count)
        points = {index: self._points(arms[index], order.count(index)) for index in set(order)}
        drawn = []
        for number, index in enumerate(order):
            nth = order[:number].count(index)
            drawn.append((arms[index], self._candidate(number, arms[index], nth, points[index][nth])))
        return drawn

    def _points(self, arm: Arm, count: int) -> list[list[float]]:
        from scipy.stats import qmc

        text = f"{self.seed} {arm.method} {arm.space}"  # its own sequence, whatever other arms there are
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4])
        width = len(arm.dimensions) + len(self.adapters) + 2
        points: list[list[float]] = qmc.Halton(width, scramble=True, seed=seed).random(count).tolist()
        return points

    def _candidate(self, number: int, arm: Arm, nth: int, point: list[float]) -> Candidate:
        parameters: dict[str, Any] = {}
        for (name, dimension), share in zip(arm.dimensions.items(), point, strict=False):
            if nth > 0 or name in self.parameters:
                parameters[name] = dimension.at(share)
        rest = point[len(arm.dimensions) :]
        recipe: dict[str, Any] = {"merge_method": arm.method, "space": arm.space}
        recipe["adapters"] = [
            {"adapter": name, **({"parameters": {WEIGHT: weight}} if weight is not None else {})}
            for name, weight in zip(self.adapters, self._weights(arm, nth, rest[2:]), strict=True)
        ]
        recipe["parameters"] = parameters
        recipe["rank"] = self.ranks[min(int(rest[1] * len(self.ranks)), len(self.ranks) - 1)]
        recipe["seed"] = self.seed
        if LAMBDA in self.parameters:
            parameters[LAMBDA] = self.parameters[LAMBDA].at(rest[0])
            return Candidate(number, recipe)
        wanted = self.parameters.get(SIZE, SIZES)
        size = arm.size if nth == 0 and SIZE not in self.parameters else wanted.at(rest[0])
        return Candidate(number, recipe, float(size))

    def _weights(self, arm: Arm, nth: int, shares: Sequence[float]) -> list[float | None]:
        if not arm.weighs or (WEIGHT not in self.parameters and nth % 2 == 0):
            return [None] * len(self.adapters)
        wanted = self.parameters.get(WEIGHT, WEIGHTS)
        return [wanted.at(share) for share in shares]


def turns(shares: Sequence[float], count: int) -> list[int]:
    """Whose turn it is, `count` times, in proportion to the shares from the beginning on (Webster's rule)."""
    taken = [0] * len(shares)
    order = []
    for _ in range(count):
        index = max(range(len(shares)), key=lambda i: shares[i] / (2 * taken[i] + 1))
        taken[index] += 1
        order.append(index)
    return order


def scaled(candidate: Candidate, size_at_one: float) -> Candidate:
    """The candidate with the λ that gives its result its size. size_at_one: that of its arm's result with λ = 1."""
    if candidate.size is None:
        return candidate
    lam = candidate.size / size_at_one if size_at_one > 0 and math.isfinite(size_at_one) else candidate.size
    parameters = {**candidate.recipe["parameters"], LAMBDA: float(f"{lam:.3g}")}
    return Candidate(candidate.number, {**candidate.recipe, "parameters": parameters}, candidate.size)


def as_name(recipe: Mapping[str, Any]) -> str:
    """The recipe as a model name. Raises UserInputError where it is too long for one."""
    inputs = []
    for item in recipe["adapters"]:
        weight = item.get("parameters", {}).get(WEIGHT)
        inputs.append(item["adapter"] + ("" if weight is None else f"={weight}"))
    settings = {"space": recipe["space"], **recipe["parameters"]}
    usual = {"rank": "auto", "energy": None, "seed": 0}
    settings |= {key: recipe[key] for key, value in usual.items() if recipe.get(key, value) != value}
    text = ",".join(f"{key}={_word(value)}" for key, value in settings.items())
    name = f"{PREFIX}{recipe['merge_method']}({','.join(inputs)};{text})"
    if len(name) > MAX_NAME:
        raise UserInputError(
            f"a candidate's name has {len(name):,} characters, more than {MAX_NAME:,}; use fewer --adapters"
        )
    return name


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
