# SPDX-License-Identifier: Apache-2.0
"""The arguments of PEFT's `add_weighted_adapter`, as JSON or YAML, to a recipe.

The numbers are those of PEFT 0.21: `svd` and `*_svd` apply alpha / r once.
"""

from __future__ import annotations

from typing import Any

from vllm_merge.convert.draft import Draft, items
from vllm_merge.convert.factor_rules import ELECTIONS, factor_rule
from vllm_merge.convert.written import Converted
from vllm_merge.recipe.problems import KeyPath
from vllm_merge.recipe.values import NAME, NAME_RULE, shown

KEYS = (
    "adapters",
    "weights",
    "adapter_name",
    "combination_type",
    "svd_rank",
    "svd_clamp",
    "svd_full_matrices",
    "svd_driver",
    "density",
    "majority_sign_method",
)
FACTOR_WISE = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
SVD = ("svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")


def from_peft(draft: Draft) -> Converted:
    """The recipe of a call. Raises RecipeError for arguments that are wrong or have no meaning here."""
    call = draft.mapping((), draft.tree.data)
    draft.known_keys((), call, KEYS)
    names = draft.names_of(("adapters",), call.get("adapters"))
    weights = draft.weights(("weights",), call.get("weights"), len(names), None)
    for index, name in enumerate(names):
        if NAME.fullmatch(name) is None:
            draft.wrong(("adapters", index), f"is {shown(name)}; a name here is {NAME_RULE}; rename the adapter")
        elif name == draft.name:
            draft.wrong(
                ("adapters", index), f"is {name!r}, the name of the result too; give the result another, by --name"
            )
        else:
            if name not in draft.given:
                draft.note(f"the path of adapter '{name}' is a guess; put it right, or give --adapter {name}=PATH")
            draft.register_as(name, draft.given.get(name, f"./{name}"))
    kind = draft.word(("combination_type",), call.get("combination_type", "svd"), (*FACTOR_WISE, "cat", *SVD))
    if len(names) == 1 and kind != "linear":
        draft.note(f"PEFT takes 'linear' in place of {kind!r} for a single adapter")
        kind = "linear"
    if kind in FACTOR_WISE:
        recipe = factor_rule(draft, (), "peft", kind, call.get("density"), call.get("majority_sign_method", "total"))
    elif kind == "cat":
        recipe = {"merge_method": "task_arithmetic", "rank": "lossless"}
    else:
        recipe = _svd(draft, kind, call, weights)
    method: dict[str, Any] = {key: recipe.pop(key) for key in ("merge_method", "space") if key in recipe}
    return draft.finish({**method, "adapters": items(names, [{"weight": weight} for weight in weights]), **recipe})


def _svd(draft: Draft, kind: str, call: Any, weights: list[float]) -> dict[str, Any]:
    """The combinations of dense weight changes, and their truncation."""
    rank = call.get("svd_rank")
    where: KeyPath = ("svd_rank",)
    if rank is None:
        draft.wrong(
            where, "is not given; PEFT then takes the largest rank of the adapters, which is not in here: write it"
        )
    elif not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        draft.wrong(where, f"is {shown(rank)}; allowed is a whole number of at least 1")
    if call.get("svd_clamp") is not None:
        draft.wrong(("svd_clamp",), "cuts entries of the singular vectors off, which has no meaning here; leave it out")
    draft.note(
        "PEFT before 0.21 may multiply by alpha / r twice here; `precondition: [peft_double_scaling]` does so too"
    )
    rule = kind.removesuffix("svd").removesuffix("_")
    if not rule:
        return {"merge_method": "task_arithmetic", "rank": rank}
    parameters: dict[str, Any] = {"density": draft.number(("density",), call.get("density"), 0, 1)}
    election = call.get("majority_sign_method", "total")
    if rule.endswith("ties"):
        election = draft.word(("majority_sign_method",), election, ELECTIONS)
    if rule.startswith("dare"):
        draft.note("which entries are dropped is drawn by this recipe's seed; the same rule, other draws")
    if rule == "ties":
        parameters["majority_sign_method"] = election
        return {"merge_method": "ties_by_count", "parameters": parameters, "rank": rank}
    if rule == "dare_ties":
        if election == "total" and len(set(weights)) == 1 and weights[0] > 0:
            parameters["lambda"] = weights[0]
        else:
            draft.wrong(
                ("combination_type",),
                "is 'dare_ties_svd', whose signs are elected without the weights or by frequency, which dare_ties here does "
                "not; it is the same with equal positive weights and majority_sign_method: total",
            )
    return {"merge_method": rule, "space": "delta", "parameters": parameters, "rank": rank}
