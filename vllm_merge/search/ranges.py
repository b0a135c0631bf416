# SPDX-License-Identifier: Apache-2.0
"""What a parameter may be in a search: a range, or a choice; as the command line says it, or as its own schema does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm_merge.errors import UserInputError
from vllm_merge.methods.parameters import ParameterSpec

SIZE, WEIGHT = "size", "weight"
SPREAD = 3.0  # a number is searched from a third of its default to three times it
DIGITS = 3  # of a number that is tried
FORM = "NAME=VALUE, NAME=VALUE,VALUE,… or NAME=LOW..HIGH"
# Copies of other tools' mistakes, what goes on from earlier results, and when an iteration may end.
_LEFT_ALONE = frozenset({"compat", "resume", "tol"})


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers from low to high, evenly or (log) by ratio. whole: integers."""

    low: float
    high: float
    log: bool = False
    whole: bool = False

    def at(self, share: float) -> float | int:
        """The number that lies at this share, 0 to 1, of the range; of few digits."""
        if self.log:
            value = math.exp(math.log(self.low) + share * (math.log(self.high) - math.log(self.low)))
        else:
            value = self.low + share * (self.high - self.low)
        if self.whole:
            return round(value)
        return min(max(float(f"{value:.{DIGITS}g}"), self.low), self.high)


@dataclass(frozen=True, slots=True)
class Choice:
    """One of some values."""

    values: tuple[Any, ...]

    def at(self, share: float) -> Any:
        """The value that lies at this share, 0 to 1."""
        return self.values[min(int(share * len(self.values)), len(self.values) - 1)]


Dimension = Range | Choice
SIZES = Range(0.63, 3.2, log=True)
WEIGHTS = Range(0.5, 2.0, log=True)


def of_schema(spec: ParameterSpec) -> Dimension | None:
    """What a parameter is searched in by default; None for one that stays at its default.

    A real number: from a third of its default to three times it, within what is allowed, by ratio; where the default is 0, all
    that is allowed, if that has an end. A word or switch: every value. Whole numbers (steps, ranks, counts) stay.
    """
    if spec.name in _LEFT_ALONE or spec.name in ("lambda", WEIGHT):
        return None
    schema = spec.json_schema
    if words := _words(schema):
        return Choice(tuple(sorted(words, key=lambda word: word != spec.default))) if len(words) > 1 else None
    if schema.get("type") != "number" or not isinstance(spec.default, float):
        return None
    least = schema.get("minimum", schema.get("exclusiveMinimum"))
    most = schema.get("maximum", schema.get("exclusiveMaximum"))
    if "exclusiveMaximum" in schema and most is not None:
        most *= 0.99
    if spec.default == 0:
        return Range(least, most) if least is not None and most is not None else None
    low, high = sorted((spec.default / SPREAD, spec.default * SPREAD))
    low, high = max(low, least if least is not None else low), min(high, most if most is not None else high)
    return Range(low, high, log=low > 0)


def _words(schema: dict[str, Any]) -> list[Any]:
    """The values of a parameter that has some only; none for a number."""
    parts = schema.get("anyOf", [schema])
    if any(part.get("type") in ("integer", "number") and "enum" not in part and "const" not in part for part in parts):
        return []
    found: list[Any] = []
    for part in parts:
        found += part.get("enum", [])
        found += [part["const"]] if "const" in part else []
        found += [True, False] if part.get("type") == "boolean" else []
    return found


def parse(text: str) -> tuple[str, Dimension]:
    """`density=0.1..0.5`, `trim=global,module` or `weight=1`. Raises UserInputError."""
    name, equals, values = text.partition("=")
    if not equals or not name.strip() or not values.strip():
        raise UserInputError(f"--parameter {text}: expected {FORM}")
    name = name.strip()
    if ".." not in values:
        return name, Choice(tuple(_value(text, part) for part in values.split(",")))
    low, high = (_value(text, part) for part in values.split("..", 1))
    if not isinstance(low, int | float) or not isinstance(high, int | float) or isinstance(low, bool) or low >= high:
        raise UserInputError(f"--parameter {text}: a range goes from a number to a larger one")
    whole = isinstance(low, int) and isinstance(high, int) and name not in (SIZE, WEIGHT, "lambda")
    return name, Range(low, high, log=low > 0 and not whole, whole=whole)


def _value(text: str, part: str) -> Any:
    part = part.strip()
    if part in ("true", "false"):
        return part == "true"
    for kind in (int, float):
        try:
            value = kind(part)
        except ValueError:
            continue
        if math.isfinite(value):
            return value
        raise UserInputError(f"--parameter {text}: {part} is not a finite number")
    if not part.isidentifier():
        raise UserInputError(f"--parameter {text}: {part!r} is no number, no word and no switch; expected {FORM}")
    return part


def check(name: str, dimension: Dimension, specs: Sequence[ParameterSpec]) -> Dimension:
    """The dimension for a method's parameter; whole where the parameter is. Raises UserInputError for a value it refuses."""
    spec = next(spec for spec in specs if spec.name == name)
    ends = (dimension.low, dimension.high) if isinstance(dimension, Range) else dimension.values
    for value in ends:
        spec.validate(f"--parameter {name}", value)
    if isinstance(dimension, Range) and dimension.whole and spec.json_schema.get("type") == "number":
        return Range(dimension.low, dimension.high, log=dimension.low > 0)
    return dimension
