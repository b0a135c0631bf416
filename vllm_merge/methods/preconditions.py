# SPDX-License-Identifier: Apache-2.0
"""The registry of preconditions: what may be done to the adapters, in order, before a merge method sees them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from vllm_merge.adapters.factors import Adapter
from vllm_merge.errors import UserInputError
from vllm_merge.methods.parameters import suggestion

Precondition = Callable[[Sequence[Adapter]], Sequence[Adapter]]
_registered: dict[str, Callable[..., Sequence[Adapter]]] = {}


def resolve_preconditions(requested: Sequence[str | Mapping[str, object]]) -> list[Precondition]:
    """The functions of the requested preconditions, each a name or {name: parameters}.

    Raises UserInputError for a name that is not registered or an entry of another form.
    """
    functions: list[Precondition] = []
    for entry in requested:
        named: Mapping[str, object] = {entry: {}} if isinstance(entry, str) else entry
        if len(named) != 1:
            raise UserInputError(f"a precondition is a name or {{name: parameters}}; found {entry!r}")
        ((name, parameters),) = named.items()
        if name not in _registered:
            known = sorted(_registered)
            raise UserInputError(
                f"unknown precondition '{name}'{suggestion(name, known)} (known: {', '.join(known) or 'none'})"
            )
        if not isinstance(parameters, Mapping):
            raise UserInputError(f"precondition '{name}': its parameters must be a mapping; found {parameters!r}")
        functions.append(partial(_registered[name], **parameters))
    return functions
