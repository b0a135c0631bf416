# SPDX-License-Identifier: Apache-2.0
"""One configuration of every method that people know from mergekit, and of its relatives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tests.methods.cases import identified
from vllm_merge import Adapter, MergedAdapter, merge
from vllm_merge.methods.registry import default_registry

SPHERICAL: dict[str, tuple[str, str, dict[str, Any]]] = {
    "slerp": ("slerp", "core", {"t": 0.3}),
    "nuslerp": ("nuslerp", "core", {}),
    "nuslerp-row": ("nuslerp", "core", {"by": "row"}),
    "nuslerp-column": ("nuslerp", "core", {"by": "column"}),
    "multislerp": ("multislerp", "core", {}),
    "karcher": ("karcher", "core", {}),
    "model_stock": ("model_stock", "core", {}),
    "model_stock-row": ("model_stock", "core", {"by": "row"}),
}
_ENTRYWISE: dict[str, tuple[str, dict[str, Any]]] = {
    "magnitude_prune": ("magnitude_prune", {"density": 0.3}),
    "magnitude_prune-global": ("magnitude_prune", {"density": 0.3, "trim": "global"}),
    "breadcrumbs": ("breadcrumbs", {"density": 0.6, "gamma": 0.05}),
    "breadcrumbs-l1": ("breadcrumbs", {"density": 0.6, "gamma": 0.05, "rescale": True}),
    "breadcrumbs_ties": ("breadcrumbs_ties", {"density": 0.6, "gamma": 0.05}),
    "breadcrumbs_ties-mean": ("breadcrumbs_ties", {"density": 0.6, "normalize": True, "rescale": True}),
    "sce": ("sce", {}),
    "sce-half": ("sce", {"density": 0.5}),
    "ram": ("ram", {}),
    "ram_plus": ("ram_plus", {}),
    "pcb": ("pcb", {"density": 0.2}),
    "emr_unified": ("emr_unified", {}),
    "consensus": ("consensus", {}),
}
_RANDOM: dict[str, tuple[str, dict[str, Any]]] = {
    "della": ("della", {}),
    "della-l1": ("della", {"rescale": "l1"}),
    "della_linear": ("della_linear", {}),
    "della_linear-l1": ("della_linear", {"rescale": "l1"}),
    "dare_linear-l1": ("dare_linear", {"rescale": "l1"}),
    "dare_ties-l1": ("dare_ties", {"rescale": "l1"}),
}


def _everywhere(cases: dict[str, tuple[str, dict[str, Any]]]) -> dict[str, tuple[str, str, dict[str, Any]]]:
    return {
        f"{name}-{space}": (method, space, parameters)
        for name, (method, parameters) in cases.items()
        for space in default_registry().get(method).spaces
    }


ENTRYWISE = {**_everywhere(_ENTRYWISE), "nearswap-delta": ("nearswap", "delta", {"t": 0.01})}
RANDOM = _everywhere(_RANDOM)
CASES = {**SPHERICAL, **ENTRYWISE, **RANDOM}


def taken(case: str, adapters: Sequence[Adapter]) -> list[Adapter]:
    """As many of the adapters as the case's method takes, each with its name for an identity."""
    return identified(list(adapters[: default_registry().get(CASES[case][0]).most_adapters]))


def run(
    case: str, adapters: Sequence[Adapter], *, weights: Sequence[float] | None = None, **more: Any
) -> MergedAdapter:
    """The merge of a case, lossless."""
    method, space, parameters = CASES[case]
    arguments = {"parameters": parameters, "rank": "lossless", **more}
    return merge(adapters, merge_method=method, space=space, weights=weights, **arguments)
