# SPDX-License-Identifier: Apache-2.0
"""mergekit's merge methods, and what each is here: names of methods and parameters, and mergekit's defaults."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Recipe = dict[str, Any]


@dataclass(frozen=True)
class Rule:
    """A method of mergekit. per_model: its parameters of a model, by our names; recipe: (its parameters with defaults filled
    in) → ours. defaults: mergekit's. space: None for the method's own. sum: it may be divided by Σ weights (`normalize`).
    whole_weights: mergekit works on W0 + ΔW, so that numbers differ. pair: it goes from the base_model, which has an adapter
    as well, to one other model, as far as `t` says.
    """

    method: str
    per_model: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    recipe: Callable[[Mapping[str, Any]], Recipe] = lambda given: {}
    space: str | None = None
    sum: bool = False
    whole_weights: bool = False
    pair: bool = False

    @property
    def skips_base(self) -> bool:
        """Whether the method takes no notice of the base model among the models."""
        return not (self.whole_weights or self.pair or self.method in ("linear", "nuslerp", "multislerp"))


_WEIGHT = {"weight": "weight"}
_DENSITY = {**_WEIGHT, "density": "density"}
_LAMBDA = {"lambda": 1.0}


def _sparse(method: str, *, elects: bool, normalize: bool, rescale: bool, more: tuple[str, ...] = ()) -> Rule:
    """A sparsified sum of task vectors, signs elected or not."""

    def recipe(given: Mapping[str, Any]) -> Recipe:
        scaled = "l1" if method.startswith(("dare", "della")) else True
        ours: Recipe = {"rescale": scaled if given["rescale"] else False, "lambda": given["lambda"]}
        return {**ours, "normalize": given["normalize"]} if elects else ours

    defaults = {**_LAMBDA, "normalize": normalize, "rescale": rescale}
    return Rule(method, {**_DENSITY, **{n: n for n in more}}, defaults, recipe, space="delta", sum=not elects)


def _ties(given: Mapping[str, Any]) -> Recipe:
    named = {name: given[name] for name in ("rescale", "normalize", "lambda")}
    return {**named, "gamma": 0.0}


def _nuslerp(given: Mapping[str, Any]) -> Recipe:
    lines = "column" if given["nuslerp_row_wise"] else "row"  # mergekit's word for it is the other
    return {"by": "module" if given["nuslerp_flatten"] else lines}


METHODS: dict[str, Rule] = {
    "linear": Rule("linear", _WEIGHT, {"normalize": True}, sum=True),
    "task_arithmetic": Rule(
        "task_arithmetic",
        _WEIGHT,
        {**_LAMBDA, "normalize": False, "rescale": False},  # nothing is dropped, so that nothing is rescaled
        lambda given: {"lambda": given["lambda"]},
        sum=True,
    ),
    "ties": Rule("breadcrumbs_ties", _DENSITY, {**_LAMBDA, "normalize": True, "rescale": False}, _ties, space="delta"),
    "dare_linear": _sparse("dare_linear", elects=False, normalize=False, rescale=True),
    "dare_ties": _sparse("dare_ties", elects=True, normalize=False, rescale=True),
    "della": _sparse("della", elects=True, normalize=True, rescale=True, more=("epsilon",)),
    "della_linear": _sparse("della_linear", elects=False, normalize=False, rescale=True, more=("epsilon",)),
    "breadcrumbs": _sparse("breadcrumbs", elects=False, normalize=False, rescale=False, more=("gamma",)),
    "breadcrumbs_ties": _sparse("breadcrumbs_ties", elects=True, normalize=False, rescale=False, more=("gamma",)),
    "sce": Rule(
        "sce",
        defaults={"select_topk": 1.0},
        recipe=lambda given: {"density": given["select_topk"], "compat": "mergekit"},
        space="delta",
    ),
    "ram": Rule(
        "ram",
        defaults={"epsilon": 1e-5},
        recipe=lambda given: {"epsilon": given["epsilon"], "threshold": "absolute"},
        space="delta",
    ),
    "ramplus_tl": Rule(
        "ram_plus",
        defaults={"epsilon": 1e-5, "r": 0.1, "alpha": 0.2},
        recipe=lambda given: {
            "epsilon": given["epsilon"],
            "threshold": "absolute",
            "boost": given["r"],
            "most": given["alpha"],
        },
        space="delta",
    ),
    "model_stock": Rule(
        "model_stock",
        defaults={"filter_wise": False},
        recipe=lambda given: {"by": "row" if given["filter_wise"] else "module", "reverse": True},
    ),
    "slerp": Rule("slerp", defaults={"t": None}, recipe=lambda given: {"t": given["t"]}, whole_weights=True, pair=True),
    "nearswap": Rule("nearswap", defaults={"t": None}, recipe=lambda given: {"t": given["t"]}, pair=True),
    "nuslerp": Rule("nuslerp", _WEIGHT, {"nuslerp_flatten": True, "nuslerp_row_wise": False}, _nuslerp),
    "multislerp": Rule(
        "multislerp",
        _WEIGHT,
        {"normalize_weights": True, "eps": 1e-8},
        lambda given: {"normalize": given["normalize_weights"]},
    ),
    "karcher": Rule(
        "karcher",
        defaults={"max_iter": 10, "tol": 1e-5},
        recipe=lambda given: {"max_iter": given["max_iter"], "tol": given["tol"]},
        whole_weights=True,
    ),
}

NO_MEANING = {
    "passthrough": "copies layers of whole models; an adapter alone is served under its own name",
    "arcee_fusion": "picks whole weights by their importance, which weight changes alone do not say",
}
