# SPDX-License-Identifier: Apache-2.0
"""What PEFT's and LoRAX's factor-wise rules have in common."""

from __future__ import annotations

from typing import Any

from vllm_merge.convert.draft import Draft
from vllm_merge.recipe.problems import KeyPath

ELECTIONS = ("total", "frequency")
IN_WEIGHTS = {
    "linear": "task_arithmetic",
    "ties": "ties",
    "dare_linear": "dare_linear",
    "dare_ties": "dare_ties",
    "magnitude_prune": "magnitude_prune",
}


def factor_rule(draft: Draft, path: KeyPath, peer: str, rule: str, density: object, election: object) -> dict[str, Any]:
    """Method and parameters of `rule` as the peer has it. path: of the mapping that has density and election."""
    parameters: dict[str, Any] = {"compat": peer}
    if rule != "linear":
        parameters["density"] = draft.number((*path, "density"), density, 0, 1)
    if rule.endswith("ties"):
        parameters["majority_sign_method"] = draft.word((*path, "majority_sign_method"), election, ELECTIONS)
    draft.note(
        f"'{rule}' merges A and B apart, which is not a merge of the weight changes; merge_method: {IN_WEIGHTS[rule]} "
        "without compat is the rule of the weight changes"
    )
    if rule.startswith("dare"):
        draft.note("which entries are dropped is drawn by this recipe's seed; the same rule, other draws")
    return {"merge_method": f"factor_{rule}", "parameters": parameters}
