# SPDX-License-Identifier: Apache-2.0
"""How large a method's result is with λ = 1. The right λ differs by a factor of a hundred between methods, the right size does not.

A method is merged once with every default, and the server's report has the norms. The size of a result is ‖ΔW‖ over √Σ‖ΔW_i‖²,
which is the norm of the adapters' sum where they are orthogonal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from vllm_merge.errors import MergeError, UserInputError
from vllm_merge.search.candidates import LAMBDA, Arm, as_name
from vllm_merge.search.endpoint import Endpoint

PROBE = "."
ENERGY = 0.999  # kept of what is measured: a result whose rank is asked for has its norms in its report


def measure(endpoint: Endpoint, arms: Sequence[Arm], adapters: Sequence[str], together: int) -> dict[str, float | str]:
    """{arm's name: the size of its result with every default}, or in its place why there is none. Raises what asking does."""

    def one(arm: Arm) -> float | str:
        try:
            return _size(endpoint, as_name(recipe(arm, adapters)))
        except UserInputError:
            raise
        except MergeError as error:
            return str(error)

    with ThreadPoolExecutor(together) as pool:
        return dict(zip([arm.name for arm in arms], pool.map(one, arms), strict=True))


def recipe(arm: Arm, adapters: Sequence[str]) -> Mapping[str, Any]:
    """What is measured."""
    inputs = [{"adapter": name} for name in adapters]
    return {
        "merge_method": arm.method,
        "space": arm.space,
        "adapters": inputs,
        "parameters": {LAMBDA: 1.0},
        "energy": ENERGY,
    }


def _size(endpoint: Endpoint, name: str) -> float:
    body = {"model": name, "prompt": PROBE, "max_tokens": 1, "temperature": 0}
    label = endpoint.post("/completions", body, alone=True).get("model")
    report = endpoint.get(f"/merge/artifacts/{label}/report").get("report") or {}
    try:
        together = math.hypot(*(float(norm) for norms in report["input_norms"].values() for norm in norms))
        size = math.hypot(*map(float, report["norms"].values())) / together
    except (KeyError, AttributeError, TypeError, ValueError, ZeroDivisionError):
        raise MergeError(f"{name}: the server does not say how large it is") from None
    if not 0 < size < math.inf:
        raise MergeError(f"{name}: has the size {size:g}")
    return size
