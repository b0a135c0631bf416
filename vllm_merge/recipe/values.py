# SPDX-License-Identifier: Apache-2.0
"""The values a recipe may write: names, ranks, and parameters that are a scalar, a gradient over depth, or filters."""

import math
import re
from typing import Annotated, Any, NoReturn, TypeAlias

from pydantic import BeforeValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_CONTINUED = re.compile(NAME.pattern + "(@[0-9a-f]{6,64})?")
NAME_RULE = "1 to 64 letters, digits, '.', '_' and '-', beginning with a letter or digit"
MAX_SEED = 2**63 - 1
MAX_GRADIENT = 1024

Scalar: TypeAlias = bool | int | float | str


def refuse(message: str) -> NoReturn:
    """Fail the validation that is running with exactly `message`."""
    raise PydanticCustomError("recipe", "{message}", {"message": message})


def is_number(value: object) -> bool:
    """Whether `value` is an int or float, and not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _scalar_or_gradient(value: object) -> object:
    if isinstance(value, list):
        if not value:
            refuse("is an empty list; a gradient has at least one number")
        if len(value) > MAX_GRADIENT:
            refuse(f"has {len(value)} points; a gradient has at most {MAX_GRADIENT}")
        if wrong := [item for item in value if not is_number(item)]:
            refuse(f"is a list with {wrong[0]!r} in it; a gradient over depth is a list of numbers")
        for item in value:
            _finite(item)
        return value
    if isinstance(value, bool | int | float | str):
        return _finite(value)
    refuse(f"is {shown(value)}; allowed are a number, a word, true or false, a list of numbers, or a list of filters")


def _finite(value: Scalar) -> Scalar:
    if isinstance(value, int | float) and not math.isfinite(value):
        refuse(f"is {value}; numbers must be finite")
    return value


def _filter(item: object) -> object:
    if not isinstance(item, dict) or "value" not in item or not item.keys() <= {"filter", "value"}:
        refuse(f"has the item {shown(item)}; a list of filters has items {{filter: TEXT, value: …}} or {{value: …}}")
    pattern = item.get("filter")
    if pattern is not None and (not isinstance(pattern, str) or not pattern):
        refuse(f"has the filter {pattern!r}; a filter is text that the module's name contains, or '*'")
    return {"filter": pattern, "value": _scalar_or_gradient(item["value"])}


def _parameter(value: object) -> object:
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return [_filter(item) for item in value]
    return _scalar_or_gradient(value)


def _rank(value: object) -> object:
    if value in ("auto", "lossless"):
        return value
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    if isinstance(value, dict) and value.keys() == {"energy"}:
        energy = value["energy"]
        if is_number(energy) and 0 < energy <= 1:
            return {"energy": float(energy)}
        refuse(f"keeps energy {energy!r}; allowed is a share above 0 and at most 1")
    refuse(f"is {shown(value)}; allowed are auto, lossless, a whole number of at least 1, or {{energy: SHARE}}")


def _precondition(value: object) -> object:
    if isinstance(value, str) and value:
        return {value: {}}
    if isinstance(value, dict) and len(value) == 1:
        ((name, parameters),) = value.items()
        if parameters is None or isinstance(parameters, dict):
            return {name: parameters or {}}
    refuse(f"is {shown(value)}; a precondition is a name, or {{name: {{parameter: value}}}}")


def _continued(value: object) -> object:
    if not isinstance(value, str) or _CONTINUED.fullmatch(value) is None:
        refuse(
            f"is {shown(value)}; give the name of a recipe or registered adapter, or NAME@DIGITS with at least "
            "6 digits of its digest"
        )
    return value


def shown(value: object) -> str:
    """`value` for a message, as it would stand in the file, cut where it is long."""
    if value is None:
        return "empty"
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


_NUMBER = {"type": "number"}
_GRADIENT = {"type": "array", "items": _NUMBER, "minItems": 1, "maxItems": MAX_GRADIENT}
_POINT = {"anyOf": [{"type": ["number", "boolean", "string"]}, _GRADIENT]}
_FILTERS = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "properties": {"filter": {"type": "string", "minLength": 1}, "value": _POINT},
        "required": ["value"],
        "additionalProperties": False,
    },
}
PARAMETER_SCHEMA: dict[str, Any] = {"anyOf": [*_POINT["anyOf"], _FILTERS]}
RANK_SCHEMA: dict[str, Any] = {
    "default": "auto",
    "description": "auto: at most the server's LoRA rank; offline, the sum of the ranks. {energy: x} keeps that share.",
    "anyOf": [
        {"enum": ["auto", "lossless"]},
        {"type": "integer", "minimum": 1},
        {
            "type": "object",
            "properties": {"energy": {"type": "number", "exclusiveMinimum": 0, "maximum": 1}},
            "required": ["energy"],
            "additionalProperties": False,
        },
    ],
}

PRECONDITION_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        {
            "type": "object",
            "minProperties": 1,
            "maxProperties": 1,
            "additionalProperties": {"type": ["object", "null"]},
        },
    ]
}

ParameterValue: TypeAlias = Annotated[Any, BeforeValidator(_parameter), WithJsonSchema(PARAMETER_SCHEMA)]
Rank: TypeAlias = Annotated[Any, BeforeValidator(_rank), WithJsonSchema(RANK_SCHEMA)]
Continued: TypeAlias = Annotated[
    str, BeforeValidator(_continued), WithJsonSchema({"type": "string", "pattern": f"^{_CONTINUED.pattern}$"})
]
Precondition: TypeAlias = Annotated[Any, BeforeValidator(_precondition), WithJsonSchema(PRECONDITION_SCHEMA)]
