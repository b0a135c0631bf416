# SPDX-License-Identifier: Apache-2.0
"""What peers_compare.py asks of the others, what one would choose here in place of it, and why the two differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

DENSITY = 0.5
SVD_RANK = 24
FACTOR_WISE = "A and B are merged apart: terms B_i A_j of different adapters join in"
DRAWS = "other draws"


@dataclass(frozen=True)
class Case:
    """name: of the peer's method. here: the method, with `parameters`, that one would choose here. asked: the peer's own
    parameters, beside weight and density. random: the peer draws. recorded: the golden file with the peer's result.
    own: the parameters of each adapter. adapters: how many. base: mergekit's base_model, the plain model, the first of the models,
    or not given.
    """

    peer: str
    name: str
    here: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    why: str = ""
    asked: Mapping[str, Any] = field(default_factory=dict)
    random: bool = False
    recorded: str | None = None
    adapters: int = 3
    base: Literal["plain", "first", "none"] = "plain"
    own: tuple[str, ...] = ("weight",)


DENSE = {"density": DENSITY}


def _peft(name: str, here: str, why: str, parameters: Mapping[str, Any] = DENSE) -> Case:
    return Case("PEFT", name, here, parameters, why, random=name.startswith("dare"))


PEFT = (
    _peft("cat", "task_arithmetic", "one formula", {}),
    _peft("svd", "task_arithmetic", "one formula, cut to the same rank", {}),
    _peft("linear", "task_arithmetic", f"{FACTOR_WISE}; each side has √(weight · alpha / r)", {}),
    _peft("ties", "ties", FACTOR_WISE),
    _peft("dare_linear", "dare_linear", f"{FACTOR_WISE}; {DRAWS}"),
    _peft("dare_ties", "dare_ties", f"{FACTOR_WISE}; {DRAWS}"),
    _peft("magnitude_prune", "magnitude_prune", FACTOR_WISE),
    _peft(
        "ties_svd",
        "ties",
        "ours is in `knots`, trims over the whole model, and its mean is weighted; our cut to a rank is iterative, near the best",
    ),
    _peft("dare_linear_svd", "dare_linear", f"{DRAWS}; ours drops in `knots`"),
    _peft(
        "magnitude_prune_svd",
        "magnitude_prune",
        "ours prunes in `knots`, not single entries of ΔW; the cut as above",
    ),
)


def _mergekit(
    name: str,
    here: str,
    why: str,
    parameters: Mapping[str, Any] = DENSE,
    *,
    own: tuple[str, ...] = ("weight", "density"),
    **more: Any,
) -> Case:
    return Case("mergekit", name, here, parameters, why, own=own, random=name.startswith(("dare", "della")), **more)


_W0 = "theirs turns W0 + ΔW, ours ΔW alone: theirs is no adapter"
_THRESHOLD = "one formula; two entries of the whole model, equal to a threshold, are told apart otherwise"
MERGEKIT = (
    _mergekit("linear", "linear", "one formula", {}, own=("weight",), base="none"),
    _mergekit(
        "task_arithmetic",
        "task_arithmetic",
        "one formula",
        {},
        own=("weight",),
        recorded="mergekit_task_arithmetic__corr4",
    ),
    _mergekit(
        "ties",
        "ties",
        "ours is in `knots` and trims over the whole model, theirs by module",
        recorded="mergekit_ties__mixed3",
    ),
    _mergekit(
        "dare_linear", "dare_linear", f"{DRAWS}; theirs rescales to the L1 norm from before, ours by 1 / density"
    ),
    _mergekit("dare_ties", "dare_ties", f"{DRAWS}; rescaling as above; theirs sums, ours is the mean of what agrees"),
    _mergekit("della", "della", f"{DRAWS}; rescaling as above"),
    _mergekit("della_linear", "della_linear", f"{DRAWS}; rescaling as above"),
    _mergekit("breadcrumbs", "breadcrumbs", _THRESHOLD, recorded="mergekit_breadcrumbs__rand3"),
    _mergekit("breadcrumbs_ties", "breadcrumbs_ties", _THRESHOLD, recorded="mergekit_breadcrumbs_ties__mixed3"),
    _mergekit(
        "sce", "sce", "ours is in `knots`, and has no absolute threshold", {}, own=(), recorded="mergekit_sce__corr4"
    ),
    _mergekit(
        "ram",
        "ram",
        "ours is in `knots`, with a threshold for being changed that is relative, theirs absolute",
        {},
        own=(),
        recorded="mergekit_ram__corr4",
    ),
    _mergekit("ramplus_tl", "ram_plus", "as `ram`", {}, own=(), recorded="mergekit_ramplus_tl__corr4"),
    _mergekit(
        "model_stock",
        "model_stock",
        "where adapters turn away from each other theirs turns the mean around, ours is 0",
        {},
        own=(),
        recorded="mergekit_model_stock__corr4",
    ),
    _mergekit(
        "nearswap", "nearswap", "one formula", {"t": 0.003}, own=(), adapters=2, base="first", asked={"t": 0.003}
    ),
    _mergekit("slerp", "slerp", _W0, {"t": 0.5}, own=(), adapters=2, base="first", asked={"t": 0.5}),
    _mergekit("nuslerp", "nuslerp", "one formula", {}, own=("weight",), adapters=2, recorded="mergekit_nuslerp__pair2"),
    _mergekit(
        "multislerp",
        "multislerp",
        f"{_W0}; with a base_model theirs stops at tensors that no adapter changes",
        {},
        own=("weight",),
        base="none",
    ),
    _mergekit("karcher", "karcher", _W0, {}, own=(), base="none"),
)
GOLDEN = (
    Case(
        "LoRAX",
        "linear",
        "task_arithmetic",
        {},
        "weights multiply A and B, and the first alpha serves all",
        recorded="lorax_linear__corr4",
    ),
    Case("LoRAX", "ties", "ties", DENSE, f"as `linear`; {FACTOR_WISE}", recorded="lorax_ties__corr4"),
    Case("LoraHub", "composition", "task_arithmetic", {}, "as LoRAX's `linear`", recorded="lorahub_linear__corr4"),
    Case(
        "KnOTS", "ties", "ties", {"density": 0.2, "lambda": 0.6}, "one formula", recorded="knots_ties_k20_mean__mixed3"
    ),
    Case(
        "KnOTS", "mean", "linear", {}, "one formula: a sum does not depend on the basis", recorded="knots_mean__corr4"
    ),
)


def peft_call(case: Case, weights: Mapping[str, float]) -> dict[str, Any]:
    """Arguments of add_weighted_adapter."""
    call: dict[str, Any] = {"adapters": list(weights), "weights": list(weights.values()), "adapter_name": "combined"}
    call["combination_type"] = case.name
    if case.name.endswith("svd"):
        call["svd_rank"] = SVD_RANK
    return {**call, **({"density": DENSITY} if case.parameters else {})}


def mergekit_config(case: Case, base: str, adapters: Mapping[str, str], weights: Mapping[str, float]) -> dict[str, Any]:
    """A configuration over `base+adapter`, of the first adapters."""
    names = list(weights)[: case.adapters]
    values = {"weight": weights, "density": dict.fromkeys(names, DENSITY)}
    models = [
        {"model": f"{base}+{adapters[name]}", "parameters": {key: values[key][name] for key in case.own}}
        for name in names
    ]
    given = {"plain": {"base_model": base}, "first": {"base_model": models[0]["model"]}, "none": {}}
    return {
        "merge_method": case.name,
        **given[case.base],
        "models": models,
        "parameters": dict(case.asked),
        "dtype": "float32",
    }
