# SPDX-License-Identifier: Apache-2.0
"""What the recipe package asks of a registry of merge methods, so that it need not import one (nor torch)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias


class ParameterSpec(Protocol):
    """One parameter of a method."""

    @property
    def name(self) -> str: ...

    @property
    def per_adapter(self) -> bool:
        """Whether every adapter (and module) may have a value of its own."""
        ...

    @property
    def default(self) -> Any: ...

    @property
    def json_schema(self) -> dict[str, Any]:
        """JSON Schema of one value."""
        ...


class MethodSpec(Protocol):
    """A merge method as recipes see it."""

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> int:
        """Part of the digest: it is raised when the method's numbers change."""
        ...

    @property
    def spaces(self) -> tuple[str, ...]: ...

    @property
    def default_space(self) -> str: ...

    @property
    def summary(self) -> str: ...

    @property
    def reference(self) -> str: ...

    @property
    def parameters(self) -> Sequence[ParameterSpec]: ...

    @property
    def most_adapters(self) -> int | None:
        """How many adapters the method takes at most; None for any number."""
        ...

    def validate(self, space: str | None, parameters: Mapping[str, object], per_adapter: bool) -> dict[str, Any]:
        """The given parameters as typed values, only those given. Raises UserInputError."""
        ...

    def defaults(self, per_adapter: bool) -> dict[str, Any]:
        """Default values of the per-adapter, or of the per-recipe parameters."""
        ...


CheckPrecondition: TypeAlias = Callable[[Mapping[str, Mapping[str, Any]]], None]
"""Raises UserInputError where {name: parameters} is not a precondition with right parameters."""


class PreconditionSpec(Protocol):
    """What is done to adapters before they are merged, as plans see it."""

    @property
    def version(self) -> int:
        """Part of the digest: it is raised when the numbers change."""
        ...

    def complete(self, given: Mapping[str, object]) -> dict[str, Any]:
        """All parameters: the given ones as typed values, and defaults. Raises UserInputError."""
        ...


class Registry(Protocol):
    """Merge methods and preconditions by name."""

    def names(self) -> Sequence[str]: ...

    def get(self, name: str) -> MethodSpec:
        """Raises UserInputError, listing the names, for one that is not there."""
        ...

    def precondition(self, name: str) -> PreconditionSpec:
        """Raises UserInputError, listing the names, for one that is not there."""
        ...
