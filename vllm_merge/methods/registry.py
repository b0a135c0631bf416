# SPDX-License-Identifier: Apache-2.0
"""The registry of merge methods: the decorator that registers one, and what recipes and the engine ask about it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module, metadata
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

from vllm_merge import methods
from vllm_merge.adapters.factors import Adapter
from vllm_merge.errors import MergeError, UserInputError
from vllm_merge.methods.parameters import ParameterSpec, parameter_specs, suggestion

if TYPE_CHECKING:
    from vllm_merge.methods.preconditions import PreconditionSpec

Apply = Callable[..., Any]  # Tensor, or in `factors` two of them
Statistics = Callable[..., Any]
Prepare = Callable[..., Sequence[Adapter]]
Coefficients = Callable[..., Tensor]
Lengths = Callable[..., Tensor]
F = TypeVar("F", bound=Apply)

ENTRY_POINTS = "vllm_merge.methods"
RANKS = {"sum": "at most Σ r_i", "adapters": "that of the adapters", "full": "full, cut to the recipe's rank"}
COSTS = {
    "factors": "the factors as they are",
    "core": "K × K matrices, K = Σ r_i",
    "knots": "n·K·d_in entries a module",
    "delta": "n·d_out·d_in entries a module",
}
OTHER_NAMES = {
    "cat": "'task_arithmetic' with rank: auto, which puts the factors side by side where they fit",
    "svd": "'task_arithmetic' with a number as its rank",
    "dare": "'dare_linear'",
    "ramplus_tl": "'ram_plus'",
}
"""What other tools call a method that has another name here."""
FULL_RANK_SPACES = frozenset({"delta"})


@dataclass(frozen=True, slots=True)
class MethodSpec:
    """What a method is: its function, the spaces it is defined in, and the schema of its parameters.

    apply(tile, statistics, **parameters) → (modules, rows, cols), the merged entries of a tile; in space `factors`
    apply(tasks: FactorTasks, statistics, **parameters) → the merged A (modules, r, d_in) and Bᵀ (modules, r, d_out).
    statistics(passes, **parameters) → anything, from all tiles of all modules; None when the method needs none.
    coefficients(**per-adapter parameters, each (modules, n) float64, **per-recipe ones) → (modules, n): the method is
    ΔW = Σ c_i ΔW_i in space `core`, so the factors can be put side by side, and it refuses by itself what `statistics`
    would, which then are not asked for; None for another method.
    columns(**per-recipe parameters) → None, or lengths(α (modules, n, d_in), **per-adapter parameters, each (modules, n, 1))
    → (modules, n, d_in), float32: with these parameters the method gives the columns of every ΔW_i, of length α_i, another
    length each (negative: and the other direction) and adds them up. None for another method.
    prepare(adapters, context, space, parameters: ResolvedParameters) → adapters, what the method does to the factors
    before they are seen in its space; None when nothing.
    entrywise: the method touches single entries, so its result depends on the basis; `core` then uses the SVD bases.
    on_the_fly: in spaces of float32 on a GPU the method takes tiles without values and makes them in its kernels.
    ordered: the result depends on the order of the adapters. iterative: it takes as many steps as it takes, or is told.
    whole_modules: the method works in `core` on singular vectors: it is given Cores of whole modules in place of tiles.
    most_adapters: how many adapters it takes at most (its statistics refuse more); None for any number.
    """

    name: str
    apply: Apply
    spaces: tuple[str, ...]
    default_space: str
    reference: str
    version: int
    summary: str
    parameters: tuple[ParameterSpec, ...]
    statistics: Statistics | None = None
    entrywise: bool = False
    whole_modules: bool = False
    prepare: Prepare | None = None
    on_the_fly: bool = False
    coefficients: Coefficients | None = None
    columns: Callable[..., Lengths | None] | None = None
    most_adapters: int | None = None
    ordered: bool = False
    iterative: bool = False

    def parameter(self, name: str) -> ParameterSpec:
        """The parameter of this name, or a UserInputError that lists the names there are."""
        for spec in self.parameters:
            if spec.name == name:
                return spec
        names = [spec.name for spec in self.parameters]
        raise UserInputError(
            f"merge method '{self.name}' has no parameter '{name}'{suggestion(name, names)} "
            f"(its parameters: {', '.join(names)})"
        )

    def check_space(self, space: str | None) -> str:
        """The space to use; None means the default. Raises UserInputError for one the method is not defined in."""
        if space is None:
            return self.default_space
        if space not in self.spaces:
            own = f"factor_{self.name}"
            hint = f"; A and B apart are merged by '{own}'" if space == "factors" and own in _registered.names() else ""
            raise UserInputError(
                f"merge method '{self.name}' is not defined in space '{space}'; allowed: {', '.join(self.spaces)}{hint}"
            )
        return space

    def validate(self, space: str | None, parameters: Mapping[str, object], per_adapter: bool) -> dict[str, Any]:
        """The given parameters as typed values, only those given.

        per_adapter: they stand at one adapter (only per-adapter parameters may) rather than at the recipe (all may).
        """
        self.check_space(space)
        values = {}
        for name, value in parameters.items():
            spec = self.parameter(name)
            if per_adapter and not spec.per_adapter:
                raise UserInputError(
                    f"merge method '{self.name}': parameter '{name}' is one of the recipe, not of an adapter; "
                    "move it to the recipe's parameters"
                )
            values[name] = spec.validate(f"merge method '{self.name}'", value)
        return values

    def defaults(self, per_adapter: bool) -> dict[str, Any]:
        """Default values of the per-adapter, or of the per-recipe parameters."""
        return {spec.name: spec.default for spec in self.parameters if spec.per_adapter == per_adapter}

    @property
    def exact(self) -> bool:
        """Whether the result depends on the weight changes alone; not so in `factors`, where A and B are merged apart."""
        return "factors" not in self.spaces

    def rank_class(self, space: str) -> str:
        """What bounds the rank of the result, a key of RANKS."""
        if not self.exact or any(parameter.name == "target_rank" for parameter in self.parameters):
            return "adapters"
        return "sum" if self.low_rank(space) else "full"

    def cost_class(self, space: str) -> str:
        """What a merge works on, a key of COSTS; as often as it takes where the method is iterative."""
        if self.scales_columns({}):
            return "core"
        return "factors" if space == "core" and self.coefficients is not None else space

    def scales_columns(self, parameters: Mapping[str, object]) -> bool:
        """Whether it only gives columns other lengths, with these parameters of the recipe and the defaults of the others."""
        every = {**self.defaults(per_adapter=False), **parameters}
        return self.columns is not None and self.columns(**every) is not None

    def low_rank(self, space: str) -> bool:
        """Whether the result's rank is at most Σ r_i in this space, so that it needs no truncation to be a LoRA."""
        return space not in FULL_RANK_SPACES


registered_preconditions: dict[str, PreconditionSpec] = {}
"""What `precondition` has registered, by name."""


class MethodRegistry:
    """Merge methods by name, and with them the preconditions that are registered."""

    def __init__(self, specs: Iterable[MethodSpec] = ()) -> None:
        self._specs = {spec.name: spec for spec in specs}

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._specs)

    def get(self, name: str) -> MethodSpec:
        """The method of this name, or a UserInputError that lists the names and the nearest one."""
        try:
            return self._specs[name]
        except KeyError:
            hint = f"; here it is {OTHER_NAMES[name]}" if name in OTHER_NAMES else suggestion(name, self.names())
            raise UserInputError(f"unknown merge method '{name}'{hint} (known: {', '.join(self.names())})") from None

    def precondition_names(self) -> list[str]:
        """The names of all preconditions, sorted."""
        return sorted(registered_preconditions)

    def precondition(self, name: str) -> PreconditionSpec:
        """The precondition of this name, or a UserInputError that lists the names and the nearest one."""
        known = self.precondition_names()
        if name not in registered_preconditions:
            raise UserInputError(
                f"unknown precondition '{name}'{suggestion(name, known)} (known: {', '.join(known) or 'none'})"
            )
        return registered_preconditions[name]

    def add(self, spec: MethodSpec) -> None:
        """Register a method; a name that is taken is a ValueError."""
        if spec.name in self._specs:
            raise ValueError(f"merge method '{spec.name}' is registered twice")
        self._specs[spec.name] = spec


_registered = MethodRegistry()


def merge_method(
    name: str,
    *,
    spaces: tuple[str, ...],
    default_space: str | None = None,
    reference: str,
    version: int = 1,
    statistics: Statistics | None = None,
    entrywise: bool = False,
    whole_modules: bool = False,
    prepare: Prepare | None = None,
    default_lambda: float = 1.0,
    on_the_fly: bool = False,
    coefficients: Coefficients | None = None,
    columns: Callable[..., Lengths | None] | None = None,
    most_adapters: int | None = None,
    ordered: bool = False,
    iterative: bool = False,
) -> Callable[[F], F]:
    """Register a function `f(tile, statistics, *, parameters…) → Tensor` as a merge method. See MethodSpec.

    With whole_modules it is `f(cores, statistics, *, parameters…)`, and `core` is its one space.

    Every method has the parameter `lambda` beside those of its signature: the engine multiplies the result with it.
    version goes into the identity of results: raise it when the numbers change.
    """

    if whole_modules and spaces != ("core",):
        raise ValueError(f"merge method '{name}' takes whole modules, which is for space 'core' alone; found {spaces}")

    def register(function: F) -> F:
        _registered.add(
            MethodSpec(
                name=name,
                apply=function,
                spaces=spaces,
                default_space=default_space or spaces[0],
                reference=reference,
                version=version,
                summary=(inspect.getdoc(function) or "").partition("\n")[0],
                parameters=(*parameter_specs(function), ParameterSpec("lambda", False, default_lambda, float)),
                statistics=statistics,
                entrywise=entrywise,
                whole_modules=whole_modules,
                prepare=prepare,
                on_the_fly=on_the_fly,
                coefficients=coefficients,
                columns=columns,
                most_adapters=most_adapters,
                ordered=ordered,
                iterative=iterative,
            )
        )
        return function

    return register


@cache
def default_registry() -> MethodRegistry:
    """The built-in methods and those that installed packages add through the entry points `vllm_merge.methods`."""
    for module in iter_modules(methods.__path__):
        import_module(f"{methods.__name__}.{module.name}")
    for entry_point in metadata.entry_points(group=ENTRY_POINTS):
        try:
            entry_point.load()
        except Exception as error:  # whatever another package's module does when it is imported
            package = entry_point.dist.name if entry_point.dist is not None else "an installed package"
            raise MergeError(
                f"the merge methods of {package} ({entry_point.value}) cannot be imported: {error}; mend or uninstall it"
            ) from error
    return _registered


def list_methods() -> list[MethodSpec]:
    """All merge methods, sorted by name."""
    registry = default_registry()
    return [registry.get(name) for name in registry.names()]
