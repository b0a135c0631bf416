# SPDX-License-Identifier: Apache-2.0
"""Golden cases of mergekit, PCB and EMR: how an entry's parameters are ours. By the method's family, never by file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Entry = Mapping[str, Any]
Rule = Callable[[Entry], dict[str, Any]]


def recipe_for(entry: Entry) -> dict[str, Any] | None:
    """Keyword arguments of `merge` for an entry of one of these families, else None."""
    method = entry.get("method") or entry["id"]
    for prefix, rule in _RULES.items():
        if method.startswith(prefix):
            return rule(entry)
    return None


def _slerp(entry: Entry) -> dict[str, Any]:
    return {"merge_method": "slerp", "parameters": {"t": entry["params"]["t"]}}


def _nuslerp(entry: Entry) -> dict[str, Any]:
    params = entry["params"]
    lines = "column" if params["nuslerp_row_wise"] else "row"  # as mergekit means them
    return {"merge_method": "nuslerp", "parameters": {"by": "module" if params["nuslerp_flatten"] else lines}}


def _multislerp(entry: Entry) -> dict[str, Any]:
    return {"merge_method": "multislerp", "parameters": {"normalize": entry["params"]["normalize_weights"]}}


def _karcher(entry: Entry) -> dict[str, Any]:
    params = entry["params"]
    return {"merge_method": "karcher", "parameters": {"max_iter": params["max_iter"], "tol": params["tol"]}}


def _model_stock(entry: Entry) -> dict[str, Any]:
    lines = "row" if entry["params"]["filter_wise"] else "module"
    return {"merge_method": "model_stock", "parameters": {"by": lines, "reverse": True}}


def _task_vectors(merge_method: str, elects: bool) -> Rule:
    """mergekit's generalised task arithmetic: a sparsified sum, or with signs elected the sum or mean of those that agree.

    A sum that is divided by Σ w_i is the sum with another λ. The per-model parameters may be one number or a list.
    """

    def recipe(entry: Entry) -> dict[str, Any]:
        params = entry["params"]
        weights = entry.get("weights") or params.get("weight")
        parameters: dict[str, Any] = {"lambda": params.get("lambda", 1.0)}
        if elects:
            parameters["normalize"] = params["normalize"]
        elif params["normalize"]:
            parameters["lambda"] /= sum(weights) or 1.0
        if merge_method.startswith(("dare", "della")):
            parameters["rescale"] = "l1" if params["rescale"] else False
        else:
            parameters["rescale"] = params["rescale"]
        own = {name: params[name] for name in ("density", "gamma", "epsilon") if name in params}
        if params["method"] == "ties":
            own["gamma"] = 0.0
        each = [
            {name: value[i] if isinstance(value, list) else value for name, value in own.items()}
            for i in range(len(entry["ranks"]))
        ]
        return {
            "merge_method": merge_method,
            "space": "delta",
            "weights": weights,
            "parameters": parameters,
            "adapter_parameters": each,
        }

    return recipe


def _sce(entry: Entry) -> dict[str, Any]:
    compat = "mergekit" if entry.get("kind") == "peer-quirk" else "none"
    parameters = {"density": entry["params"]["select_topk"], "compat": compat}
    return {"merge_method": "sce", "space": "delta", "parameters": parameters}


def _ram(entry: Entry) -> dict[str, Any]:
    params = entry["params"]
    parameters = {"epsilon": params["epsilon"], "threshold": "absolute"}
    if params["method"] == "ram":
        return {"merge_method": "ram", "space": "delta", "parameters": parameters}
    return {
        "merge_method": "ram_plus",
        "space": "delta",
        "parameters": {**parameters, "boost": params["r"], "most": params["alpha"]},
    }


def _pcb(entry: Entry) -> dict[str, Any]:
    params = entry["params"]
    parameters = {"density": params["pcb_ratio"], "lambda": params["lambda"]}
    return {"merge_method": "pcb", "space": "delta", "parameters": parameters}


_RULES: dict[str, Rule] = {
    "mergekit_slerp": _slerp,
    "mergekit_nuslerp": _nuslerp,
    "mergekit_multislerp": _multislerp,
    "mergekit_karcher": _karcher,
    "mergekit_model_stock": _model_stock,
    "mergekit_breadcrumbs_ties": _task_vectors("breadcrumbs_ties", True),
    "mergekit_breadcrumbs": _task_vectors("breadcrumbs", False),
    "mergekit_ties": _task_vectors("breadcrumbs_ties", True),
    "mergekit_dare_ties": _task_vectors("dare_ties", True),
    "mergekit_dare_linear": _task_vectors("dare_linear", False),
    "mergekit_della_linear": _task_vectors("della_linear", False),
    "mergekit_della": _task_vectors("della", True),
    "mergekit_sce": _sce,
    "mergekit_ram": _ram,
    "pcb": _pcb,
    "emr_unified": lambda entry: {"merge_method": "emr_unified", "space": "delta"},
}
