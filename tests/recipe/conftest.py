# SPDX-License-Identifier: Apache-2.0
"""A registry of two methods, so that the recipe package is tested without torch and without the real ones."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from vllm_merge.errors import UserInputError
from vllm_merge.recipe.file import RecipeFile
from vllm_merge.recipe.loading import knows_none, parse_recipes
from vllm_merge.recipe.plan import Plan, make_plan


@dataclass(frozen=True)
class FakeParameter:
    name: str
    per_adapter: bool
    default: Any
    low: float = float("-inf")
    high: float = float("inf")

    @property
    def json_schema(self) -> dict[str, Any]:
        return {"type": "boolean" if isinstance(self.default, bool) else "number", "default": self.default}


@dataclass(frozen=True)
class FakeMethod:
    name: str
    spaces: tuple[str, ...]
    parameters: tuple[FakeParameter, ...]
    version: int = 1
    summary: str = "A method."
    reference: str = "none"
    most_adapters: int | None = None

    @property
    def default_space(self) -> str:
        return self.spaces[0]

    def validate(self, space: str | None, parameters: Mapping[str, object], per_adapter: bool) -> dict[str, Any]:
        known = {p.name: p for p in self.parameters}
        for name, value in parameters.items():
            if name not in known:
                raise UserInputError(f"{self.name} has no parameter '{name}'")
            if per_adapter and not known[name].per_adapter:
                raise UserInputError(f"'{name}' is a parameter of the recipe")
            if type(known[name].default) is bool:
                if type(value) is not bool:
                    raise UserInputError(f"{name} is {value!r}; allowed is true or false")
            elif isinstance(value, bool | str) or not known[name].low < value <= known[name].high:  # type: ignore[operator]
                raise UserInputError(f"{name} is {value!r}; allowed is a number in its range")
        return dict(parameters)

    def defaults(self, per_adapter: bool) -> dict[str, Any]:
        return {p.name: p.default for p in self.parameters if p.per_adapter == per_adapter}


@dataclass(frozen=True)
class FakePrecondition:
    version: int = 1

    def complete(self, given: Mapping[str, object]) -> dict[str, Any]:
        return {"mads": 3.0, **given}


@dataclass
class FakeRegistry:
    methods: dict[str, FakeMethod] = field(default_factory=dict)
    preconditions: dict[str, FakePrecondition] = field(default_factory=lambda: {"cap": FakePrecondition()})

    def precondition(self, name: str) -> FakePrecondition:
        return self.preconditions[name]

    def names(self) -> list[str]:
        return sorted(self.methods)

    def get(self, name: str) -> FakeMethod:
        if name not in self.methods:
            raise UserInputError(f"unknown merge method '{name}' (known: {', '.join(self.names())})")
        return self.methods[name]


WEIGHT = FakeParameter("weight", True, 1.0)
LAMBDA = FakeParameter("lambda", False, 1.0)


@pytest.fixture
def registry() -> FakeRegistry:
    density = FakeParameter("density", True, 0.2, 0, 1)
    normalize = FakeParameter("normalize", False, True)
    return FakeRegistry(
        {
            "linear": FakeMethod("linear", ("core", "delta"), (WEIGHT, LAMBDA)),
            "ties": FakeMethod("ties", ("knots", "delta"), (WEIGHT, density, normalize, LAMBDA), version=2),
        }
    )


@pytest.fixture
def load(registry: FakeRegistry) -> Callable[[str], RecipeFile]:
    """Parse the text of a recipe file called /files/r.yaml."""

    def check(entry: Mapping[str, Mapping[str, Any]]) -> None:
        if not entry.keys() <= registry.preconditions.keys():
            knows_none(entry)

    return lambda text: parse_recipes(text, Path("/files/r.yaml"), registry, check_precondition=check)


@pytest.fixture
def plan(registry: FakeRegistry, load: Callable[[str], RecipeFile]) -> Callable[..., Plan]:
    """The plan of a recipe of a text; adapter hashes are made from the adapters' paths unless given."""

    def make(text: str, name: str = "r", **options: Any) -> Plan:
        file = load(text)
        hashes = {adapter: f"hash of {entry.path}" for adapter, entry in file.adapters.items()}
        defaults = {"adapter_hashes": hashes, "base_model_hash": "base", "max_rank": None, "dtype": "float32"}
        return make_plan(file, name, **{"registry": registry, **defaults, **options})

    return make
