# SPDX-License-Identifier: Apache-2.0
"""Weights that are normalised."""

from __future__ import annotations

from vllm_merge.algebra.tiles import Passes
from vllm_merge.errors import UserInputError


def check_weights(passes: Passes, method: str) -> None:
    """Refuse weights that add up to 0 at a module, so that they cannot be normalised."""
    zero = passes.parameters["weight"].sum(1) == 0
    if bool(zero.any()):
        module = passes.modules[int(zero.nonzero()[0, 0])]
        raise UserInputError(
            f"merge method '{method}': the weights of the adapters add up to 0 at module '{module}', so that they cannot "
            "be normalised; change a weight"
        )
