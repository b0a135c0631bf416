# SPDX-License-Identifier: Apache-2.0
"""The values that an experiment may write: arms, units, moments and ranges."""

import re
from datetime import datetime
from typing import Annotated, Any, TypeAlias

from pydantic import BeforeValidator, Field, WithJsonSchema

from vllm_merge.recipe.values import NAME, NAME_RULE, is_number, refuse, shown

MAX_ARMS = 16
MAX_WEIGHT = 1e9
# Fields of an OpenAI request, in the order in which they are tried.
UNITS = ("safety_identifier", "user", "prompt_cache_key")
_HEADER = re.compile(r"[A-Za-z0-9_-]{1,64}")


def read_arms(value: object) -> object:
    if not isinstance(value, dict):
        refuse(f"is {shown(value)}; arms are {{NAME: WEIGHT, …}}, at least two")
    if len(value) < 2:
        refuse("has fewer than two arms; compare at least two")
    if len(value) > MAX_ARMS:
        refuse(f"has {len(value)} arms; at most {MAX_ARMS}")
    arms = {}
    for name, arm in value.items():
        if NAME.fullmatch(name) is None:
            refuse(f"has the arm {shown(name)}; a name is {NAME_RULE}")
        given = {"weight": arm} if is_number(arm) else arm
        if not isinstance(given, dict) or not given.keys() <= {"weight", "serve"} or not is_number(given.get("weight")):
            refuse(f"has {name}: {shown(arm)}; an arm is NAME: WEIGHT or NAME: {{serve: RECIPE, weight: WEIGHT}}")
        arms[name] = {"serve": name, **given, "weight": float(given["weight"])}
    if not any(arm["weight"] > 0 for arm in arms.values()):
        refuse("has no weight above 0")
    return arms


def _unit(value: object) -> object:
    words = [*UNITS, "request"]
    if value in words:
        return value
    if not isinstance(value, dict) or value.keys() != {"header"} or not isinstance(value["header"], str):
        refuse(f"is {shown(value)}; allowed are {', '.join(words)}, or {{header: NAME}}")
    if _HEADER.fullmatch(value["header"]) is None:
        refuse(f"has the header {shown(value['header'])}; a header's name is letters, digits, '-' and '_'")
    return {"header": value["header"].lower()}


def _instant(value: object) -> object:
    if isinstance(value, datetime):
        return value
    try:
        instant = datetime.fromisoformat(value) if isinstance(value, str) else None
    except ValueError:
        instant = None
    if instant is None or instant.tzinfo is None:
        refuse(f"is {shown(value)}; a moment is written as 2026-01-31T09:00:00Z, with its offset")
    return instant


def _range(value: object) -> object:
    items = value if isinstance(value, list | tuple) else []
    if len(items) != 2 or not all(is_number(item) for item in items) or not 0 <= items[0] < items[1] <= 1:
        refuse(f"is {shown(value)}; a range is [START, END] with 0 <= START < END <= 1")
    return float(items[0]), float(items[1])


_MOMENT = WithJsonSchema({"type": "string", "format": "date-time"})
_RANGE = WithJsonSchema(
    {"type": "array", "items": {"type": "number", "minimum": 0, "maximum": 1}, "minItems": 2, "maxItems": 2}
)
_WEIGHT = {"type": "number", "minimum": 0, "maximum": MAX_WEIGHT}
ARMS_SCHEMA = {
    "type": "object",
    "minProperties": 2,
    "maxProperties": MAX_ARMS,
    "propertyNames": {"pattern": f"^{NAME.pattern}$"},
    "description": "NAME: WEIGHT of a recipe, an adapter or `base`; or NAME: {serve: RECIPE, weight: WEIGHT}.",
    "additionalProperties": {
        "anyOf": [
            _WEIGHT,
            {
                "type": "object",
                "properties": {"serve": {"type": "string", "minLength": 1}, "weight": _WEIGHT},
                "required": ["weight"],
                "additionalProperties": False,
            },
        ]
    },
}
_UNIT_SCHEMA = {
    "anyOf": [
        {"enum": [*UNITS, "request"]},
        {
            "type": "object",
            "properties": {"header": {"type": "string", "pattern": f"^{_HEADER.pattern}$"}},
            "required": ["header"],
            "additionalProperties": False,
        },
    ],
    "description": "Who keeps their arm: a field of the request, a header, or nobody (request). Where it is not given, the "
    f"first of {', '.join(UNITS)} that is, else the request itself.",
}

Unit: TypeAlias = Annotated[Any, BeforeValidator(_unit), WithJsonSchema(_UNIT_SCHEMA)]
Moment: TypeAlias = Annotated[datetime, BeforeValidator(_instant), _MOMENT]
Range: TypeAlias = Annotated[tuple[float, float], BeforeValidator(_range), _RANGE]
Share: TypeAlias = Annotated[float, Field(ge=0, le=1)]
Limit: TypeAlias = Annotated[float, Field(ge=0, allow_inf_nan=False)]
