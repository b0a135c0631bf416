# SPDX-License-Identifier: Apache-2.0
"""What a parameter is for a module: precedence, filters by module name, and gradients over depth."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from vllm_merge.recipe.protocols import MethodSpec, ParameterSpec
from vllm_merge.recipe.values import Scalar

# A scalar; a list of numbers, a gradient over depth; or a list of {"filter": text | None, "value": scalar | gradient}.
Value: TypeAlias = Any

_FIRST_NUMBER = re.compile(r"^(.*?)\.(\d+)(?:\.|$)")
_EMBEDDING = re.compile(r"(?:^|\.)(?:\w*embed\w*|wte|wpe)$")


def varies(parameter: ParameterSpec) -> bool:
    """Whether the parameter may have another value for every module: those of one adapter, and the factor lambda."""
    return parameter.per_adapter or parameter.name == "lambda"


def scalars(value: Value) -> Iterator[Scalar]:
    """Every scalar that stands in `value`."""
    if isinstance(value, list):
        for item in value:
            yield from scalars(item["value"] if isinstance(item, dict) else item)
    else:
        yield value


def layered(values: Iterable[Value]) -> Value:
    """One value that is the first of `values` wherever that has something for a module, then the second, and so on.

    The simplest form is chosen: a scalar where it is the same everywhere, a gradient where no filter is left.
    """
    items: list[dict[str, Any]] = []
    for value in values:
        filtered = isinstance(value, list) and isinstance(value[0], dict)
        for item in value if filtered else [{"filter": None, "value": value}]:
            pattern = None if item["filter"] == "*" else item["filter"]
            if not any(known["filter"] == pattern for known in items):  # the first of equal filters wins
                items.append({"filter": pattern, "value": _simplest(item["value"])})
            if pattern is None:
                same = all(item["value"] == items[0]["value"] for item in items)
                return items[0]["value"] if same else items
    return items


def evaluate(value: Value, modules: Sequence[str], depths: Mapping[str, float]) -> Any:
    """`value` for each of `modules`: the scalar itself where there is one, else {module: number}.

    A filter takes the modules whose names contain it; the first that does wins. `depths` is from `relative_depths`.
    """
    if not isinstance(value, list):
        return value
    items: list[dict[str, Any]] = value if isinstance(value[0], dict) else [{"filter": None, "value": value}]
    result = {}
    for module in modules:
        chosen = next(item["value"] for item in items if item["filter"] is None or item["filter"] in module)
        result[module] = _at(chosen, depths[module]) if isinstance(chosen, list) else chosen
    return result


def relative_depths(modules: Iterable[str]) -> dict[str, float]:
    """Depth of each module between 0 (first layer) and 1 (last layer).

    The layer is the first number in the module's name, counted among the modules whose names are equal before it
    (`model.layers` and `vision.blocks` are stacks of their own, each as deep as its highest number). A module without a
    number, such as `lm_head`, comes after the layers: 1; an embedding, by its name, before them: 0. With a single layer,
    that layer is 0.
    """
    names = list(modules)
    layers = {name: (match[1], int(match[2])) for name in names if (match := _FIRST_NUMBER.match(name))}
    last: dict[str, int] = {}
    for stack, index in layers.values():
        last[stack] = max(last.get(stack, 0), index)
    return {
        name: layers[name][1] / max(last[layers[name][0]], 1) if name in layers else float(not _EMBEDDING.search(name))
        for name in names
    }


def recipe_parameters(spec: MethodSpec, given: Mapping[str, Value]) -> dict[str, Value]:
    """The parameters of a merge that are not of an adapter, defaults filled in."""
    return {
        name: layered([given[name], default] if name in given else [default])
        for name, default in spec.defaults(per_adapter=False).items()
    }


def adapter_parameters(spec: MethodSpec, own: Mapping[str, Value], recipe: Mapping[str, Value]) -> dict[str, Value]:
    """One adapter's parameters: its own; where those say nothing, the recipe's; then the method's defaults."""
    return {
        name: layered([*(given[name] for given in (own, recipe) if name in given), default])
        for name, default in spec.defaults(per_adapter=True).items()
    }


def _simplest(value: Value) -> Value:
    """A gradient of equal numbers is a scalar."""
    if isinstance(value, list) and all(item == value[0] for item in value):
        return value[0]
    return value


def _at(gradient: Sequence[float], depth: float) -> float:
    """Linear interpolation between the gradient's evenly spaced points, depth 0 at the first and 1 at the last."""
    position = depth * (len(gradient) - 1)
    left = min(int(position), len(gradient) - 2)
    share = position - left
    return gradient[left] * (1 - share) + gradient[left + 1] * share
