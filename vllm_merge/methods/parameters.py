# SPDX-License-Identifier: Apache-2.0
"""The parameter schema of a method, read from its signature: names, defaults, constraints, validation by pydantic."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from vllm_merge.errors import UserInputError
from vllm_merge.methods.markers import PerAdapter

_STRICT = ConfigDict(allow_inf_nan=False)


@cache
def _type_adapter(annotation: Any) -> TypeAdapter[Any]:
    plain = annotation in (float, int, bool, str) or get_origin(annotation) is Annotated
    return TypeAdapter(annotation, config=_STRICT) if plain else TypeAdapter(annotation)


@dataclass(frozen=True, slots=True)
class ParameterSpec:
    """One parameter of a method: what a recipe may write, and for whom."""

    name: str
    per_adapter: bool
    default: object
    annotation: Any

    @property
    def adapter(self) -> TypeAdapter[Any]:
        """The pydantic type that one value is checked with."""
        return _type_adapter(self.annotation)

    @property
    def json_schema(self) -> dict[str, Any]:
        """JSON Schema of one value, with the default."""
        return {**self.adapter.json_schema(), "default": self.default}

    @property
    def allowed(self) -> str:
        """The allowed values in words, e.g. `number > 0, ≤ 1` or `one of 'global', 'module'`."""
        return _in_words(self.adapter.json_schema())

    def validate(self, owner: str, value: object) -> Any:
        """The typed value; {module: value} is checked value by value where the parameter may differ by module.

        Raises UserInputError that names the parameter, what was found and what is allowed.
        """
        if isinstance(value, Mapping) and (self.per_adapter or self.name == "lambda"):
            return {str(module): self._scalar(f"{owner} for module '{module}'", part) for module, part in value.items()}
        return self._scalar(owner, value)

    def _scalar(self, owner: str, value: object) -> Any:
        try:
            if isinstance(value, bool) and self.annotation is not bool and bool not in get_args(self.annotation):
                raise ValueError("a boolean is not a number")
            return self.adapter.validate_python(value)
        except (ValidationError, ValueError):
            raise UserInputError(
                f"{owner}: parameter '{self.name}' is {value!r}; allowed is {self.allowed} (default {self.default!r})"
            ) from None


def _in_words(schema: Mapping[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(_in_words(one) for one in schema["anyOf"])
    if "enum" in schema:
        return "one of " + ", ".join(repr(value) for value in schema["enum"])
    if "const" in schema:
        return repr(schema["const"])
    bounds = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
    limits = [f"{sign} {schema[key]:g}" for key, sign in bounds.items() if key in schema]
    return " ".join([str(schema.get("type", "value")), ", ".join(limits)]).strip()


def parameter_specs(function: Callable[..., Any]) -> tuple[ParameterSpec, ...]:
    """The keyword-only parameters of a method function. PerAdapter marks those that differ by adapter and module."""
    hints = get_type_hints(function, include_extras=True)
    specs = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            continue
        annotation = hints[parameter.name]
        extras = get_args(annotation)[1:] if get_origin(annotation) is Annotated else ()
        marker = next((extra for extra in extras if isinstance(extra, PerAdapter)), None)
        if marker is not None:
            constraints = tuple(extra for extra in extras if extra is not marker)
            annotation = Annotated[float, *constraints] if constraints else float
            specs.append(ParameterSpec(parameter.name, True, marker.default, annotation))
        elif parameter.default is inspect.Parameter.empty:
            raise TypeError(f"{function.__qualname__}: parameter '{parameter.name}' needs a default")
        else:
            specs.append(ParameterSpec(parameter.name, False, parameter.default, annotation))
    return tuple(specs)


def suggestion(name: str, names: list[str]) -> str:
    """`, did you mean 'x'?` for the nearest of names, or nothing."""
    near = difflib.get_close_matches(name, names, n=1)
    return f", did you mean '{near[0]}'?" if near else ""
