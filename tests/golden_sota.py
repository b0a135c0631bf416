# SPDX-License-Identifier: Apache-2.0
"""Golden cases of DC-Merge and RobustMerge: how an entry's parameters are ours. By the method's family, never by file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Entry = Mapping[str, Any]


def recipe_for(entry: Entry) -> dict[str, Any] | None:
    """Keyword arguments of `merge` for an entry of one of these families, else None."""
    method, params = entry.get("method") or entry["id"], entry["params"]
    if method.startswith("dc_merge"):
        own = {"smoothing": params["smoothing"], "rho": params["rho"], "lambda": params["alpha"]}
        return {"merge_method": "dc_merge", "parameters": own}
    if method.startswith("robustmerge"):
        named = {"mask_ratio": "density", "att_ratio": "clamp", "fuse_weight": "fuse_weight"}
        return {
            "merge_method": "robustmerge",
            "parameters": {own: params[n] for n, own in named.items() if n in params},
        }
    return None
