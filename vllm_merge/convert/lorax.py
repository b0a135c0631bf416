# SPDX-License-Identifier: Apache-2.0
"""A LoRAX request with `merged_adapters`, or that object alone, to a recipe."""

from __future__ import annotations

from typing import Any

from vllm_merge.convert.draft import Draft, items
from vllm_merge.convert.factor_rules import factor_rule
from vllm_merge.convert.written import Converted
from vllm_merge.recipe.file import is_local
from vllm_merge.recipe.problems import KeyPath

KEYS = ("ids", "weights", "merge_strategy", "density", "majority_sign_method")
STRATEGIES = ("linear", "ties", "dare_linear", "dare_ties")
SOURCES = ("hub", "local", "s3", "pbase")


def from_lorax(draft: Draft) -> Converted:
    """The recipe of a request. Raises RecipeError for fields that are wrong or have no meaning here."""
    path: KeyPath = ()
    source = "hub"
    outer = found = draft.mapping((), draft.tree.data)
    if "merged_adapters" not in outer and isinstance(outer.get("parameters"), dict):
        path, outer = ("parameters",), outer["parameters"]
    if "merged_adapters" in outer:
        others = [key for key in (*found, *outer) if key not in ("parameters", "merged_adapters", "adapter_source")]
        if "api_token" in others:
            draft.note("api_token is left out: no recipe holds one; set HF_TOKEN where adapters are fetched")
        if rest := [key for key in dict.fromkeys(others) if key != "api_token"]:
            draft.note(f"left out, as they belong to a request: {', '.join(rest)}")
        source = draft.word((*path, "adapter_source"), outer.get("adapter_source", "hub"), SOURCES)
        if source in ("s3", "pbase"):
            draft.wrong((*path, "adapter_source"), f"is {source!r}; fetch the adapters to a folder, and write 'local'")
        path = (*path, "merged_adapters")
        found = draft.mapping(path, outer["merged_adapters"])
    draft.known_keys(path, found, KEYS)
    ids = draft.names_of((*path, "ids"), found.get("ids"))
    weights = draft.weights((*path, "weights"), found.get("weights") or None, len(ids), 1.0)
    local = source == "local"
    names = [draft.register(draft.given.get(one, f"./{one}" if local and not is_local(one) else one)) for one in ids]
    rule = draft.word((*path, "merge_strategy"), found.get("merge_strategy", "linear"), STRATEGIES)
    recipe = factor_rule(draft, path, "lorax", rule, found.get("density"), found.get("majority_sign_method", "total"))
    draft.note("compat: lorax has LoRAX's bugs too: weights multiply A and B, the first adapter's alpha serves all")
    method: dict[str, Any] = {key: recipe.pop(key) for key in ("merge_method", "space") if key in recipe}
    return draft.finish({**method, "adapters": items(names, [{"weight": weight} for weight in weights]), **recipe})
