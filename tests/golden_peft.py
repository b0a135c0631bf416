# SPDX-License-Identifier: Apache-2.0
"""Golden cases of PEFT, LoRAX and LoraHub: how an entry's parameters are ours. By the method's family, never by file.

Entries of kind `peer-quirk` are asked for under `compat`. Factor-wise entries are quirks all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Entry = Mapping[str, Any]
FACTOR_WISE = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")


def recipe_for(entry: Entry) -> dict[str, Any] | None:
    """Keyword arguments of `merge` for an entry of one of these peers, else None."""
    peer, _, rest = (entry.get("method") or entry["id"]).partition("_")
    params = entry["params"]
    if peer == "peft" and params.get("combination_type", "").endswith("svd"):
        return _svd(entry)
    rule = params.get("combination_type", params.get("merge_strategy", rest.split("__")[0]))
    if peer not in ("peft", "lorax", "lorahub") or rule not in FACTOR_WISE:
        return None
    return {
        "merge_method": f"factor_{rule}",
        "parameters": {**_of_rule(rule, params), "compat": "peft" if peer == "peft" else "lorax"},
    }


def _of_rule(rule: str, params: Mapping[str, Any]) -> dict[str, Any]:
    wanted = {"ties": ("density", "majority_sign_method"), "linear": ()}
    names = wanted.get(rule.removeprefix("dare_"), ("density",)) if rule != "dare_linear" else ("density",)
    return {name: params[name] for name in names if name in params}


def _svd(entry: Entry) -> dict[str, Any] | None:
    """PEFT's combinations of dense ΔW, and their truncation."""
    params = entry["params"]
    rule = params["combination_type"].removesuffix("svd").removesuffix("_")
    quirk = entry.get("kind") == "peer-quirk"
    rank = params.get("svd_rank") or max(entry["ranks"])
    twice = ["peft_double_scaling"] if quirk else []
    if rule == "":
        return {"merge_method": "task_arithmetic", "rank": rank, "precondition": twice}
    if rule == "ties":
        compat = {"compat": "peft" if quirk else "none"}
        return {"merge_method": "ties_by_count", "parameters": {**_of_rule(rule, params), **compat}, "rank": rank}
    if rule == "magnitude_prune":
        return {
            "merge_method": "magnitude_prune",
            "space": "delta",
            "parameters": {"density": params["density"]},
            "rank": rank,
            "precondition": twice,
        }
    return None
