# SPDX-License-Identifier: Apache-2.0
"""Golden cases of DOGE and DARE: how an entry's parameters are ours. By the method's family, never by file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Entry = Mapping[str, Any]


def recipe_for(entry: Entry) -> dict[str, Any] | None:
    """Keyword arguments of `merge` for an entry of one of these families, else None."""
    method = entry.get("method") or entry["id"]
    for prefix, rule in _RULES.items():
        if method.startswith(prefix):
            return rule(entry["params"])
    return None


def _doge(params: Mapping[str, Any]) -> dict[str, Any]:
    own = {"coefficient": params["lamda"], "density": params["K"] / 100}
    return {
        "merge_method": "doge",
        "space": "delta",
        "parameters": {**own, "subspace": params["subspace"], "steps": params["steps"]},
    }


def _dare_ties(space: str) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    def recipe(params: Mapping[str, Any]) -> dict[str, Any]:
        if params["topK"] != 100:
            raise ValueError("dare_ties drops at random and does not trim")
        return {
            "merge_method": "dare_ties",
            "space": space,
            "parameters": {
                "density": 1 - params["dare_pruning_coeffs"],
                "normalize": params.get("merging_type", "mean") == "mean",
                "lambda": params["lambda"],
            },
        }

    return recipe


_RULES: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "doge_ta_": _doge,
    "knots_dare_ties": _dare_ties("knots"),
    "core_dare_ties": _dare_ties("core"),
}
