# SPDX-License-Identifier: Apache-2.0
"""What the methods have in common that go from one adapter to another."""

from __future__ import annotations

from collections.abc import Callable

from vllm_merge.algebra.tiles import Passes
from vllm_merge.errors import UserInputError


def check_pair(method: str) -> Callable[..., None]:
    """Statistics of a method that takes two adapters: none, but more than two are refused."""

    def check(passes: Passes, **parameters: object) -> None:
        names = [adapter.name for adapter in passes.adapters]
        if len(names) > 2:
            raise UserInputError(
                f"merge method '{method}' goes from one adapter to another and takes two; found {len(names)} "
                f"({', '.join(names)}). For more, merge two at a time, or use multislerp or karcher"
            )

    return check
