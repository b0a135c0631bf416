# SPDX-License-Identifier: Apache-2.0
"""A mergekit configuration over models of the form `base+lora`, to a recipe.

mergekit makes whole models of them first, whose difference from the base is ΔW again, so that methods of task vectors come
to the same. Keys and their meaning: arcee-ai/mergekit, June 2026.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_merge.convert.draft import LARGE, Draft, items
from vllm_merge.convert.mergekit_methods import METHODS, NO_MEANING, Rule
from vllm_merge.convert.mergekit_models import Model, read_models
from vllm_merge.convert.written import Converted
from vllm_merge.recipe.problems import listed
from vllm_merge.recipe.values import is_number, shown

LEFT_OUT = {
    "dtype": "the server's dtype is used; offline, give `vllm-merge merge --dtype`",
    "out_dtype": "the server's dtype is used; offline, give `vllm-merge merge --dtype`",
    "tokenizer": "the base model's tokenizer is used",
    "tokenizer_source": "the base model's tokenizer is used",
    "chat_template": "the base model's chat template is used",
    "name": "the recipe's name is given by --name",
}
NO_MEANING_KEYS = {
    "slices": "layers are not rearranged; a parameter may be a list, a gradient over the layers: write `models:`",
    "modules": "parts of a model are not merged apart; a parameter may have filters: write `models:`",
}
KEYS = ("merge_method", "base_model", "models", "parameters", *LEFT_OUT, *NO_MEANING_KEYS)
Values = Mapping[str, Any]


def from_mergekit(draft: Draft) -> Converted:
    """The recipe of a configuration. Raises RecipeError for what is wrong or has no meaning for adapters."""
    config = draft.mapping((), draft.tree.data)
    draft.known_keys((), config, KEYS)
    for key, why in NO_MEANING_KEYS.items():
        if key in config:
            draft.wrong((key,), f"has no meaning here: {why}")
    for key, why in LEFT_OUT.items():
        if key in config:
            draft.note(f"{key} is left out: {why}")
    rule = _rule(draft, config.get("merge_method"))
    base, models = read_models(
        draft, config, skips_base=rule.skips_base, counts_base=rule.method == "linear", pair=rule.pair
    )
    given = draft.mapping(("parameters",), config.get("parameters") or {})
    draft.known_keys(("parameters",), given, {*rule.defaults, *rule.per_model, "int8_mask"})
    for model in models:
        draft.known_keys(("models", model.index, "parameters"), model.parameters, {*rule.per_model, "int8_mask"})
    if rule.pair and given.get("t") is None:
        ends = "from 0 (the base_model) to 1" if rule.whole_weights else "in units of the weights"
        draft.wrong(("parameters", "t"), f"is missing; {rule.method} needs it, {ends}")
    if draft.problems:
        return draft.finish({})
    return draft.finish(_recipe(draft, rule, config, given, models), base)


def _rule(draft: Draft, method: object) -> Rule:
    if isinstance(method, str) and method in METHODS:
        return METHODS[method]
    if isinstance(method, str) and method in NO_MEANING:
        draft.wrong(("merge_method",), f"is {method!r}, which has no meaning for adapters: it {NO_MEANING[method]}")
    else:
        draft.wrong(("merge_method",), f"is {shown(method)}; allowed: {listed(sorted(METHODS))}")
    return Rule("any")


def _recipe(draft: Draft, rule: Rule, config: Values, given: Values, models: list[Model]) -> dict[str, Any]:
    full = {**rule.defaults, **given}
    adapters = [model for model in models if model.adapter is not None]
    own = []
    for position, model in enumerate(adapters):
        mine = {ours: model.parameters[theirs] for theirs, ours in rule.per_model.items() if theirs in model.parameters}
        own.append(mine)
        for theirs, ours in rule.per_model.items():
            draft.origin[("adapters", position, "parameters", ours)] = ("models", model.index, "parameters", theirs)
    parameters = rule.recipe(full)
    parameters |= {ours: given[theirs] for theirs, ours in rule.per_model.items() if theirs in given}
    for theirs in rule.defaults:
        draft.origin[("parameters", "density" if theirs == "select_topk" else theirs)] = ("parameters", theirs)
    for theirs, ours in rule.per_model.items():
        draft.origin[("parameters", ours)] = ("parameters", theirs)
    method = rule.method
    if rule.sum:
        weights = [model.parameters.get("weight", given.get("weight", 1.0)) for model in models]
        method, parameters = _normalized(draft, rule, bool(full["normalize"]), parameters, models, weights)
    _tell(draft, rule, config)
    names = [model.adapter for model in adapters if model.adapter is not None]
    space = {} if rule.space is None else {"space": rule.space}
    return {"merge_method": method, **space, "adapters": items(names, own), "parameters": parameters}


def _normalized(
    draft: Draft, rule: Rule, normalize: bool, parameters: dict[str, Any], models: list[Model], weights: list[Any]
) -> tuple[str, dict[str, Any]]:
    """Method and parameters of a sum that mergekit may divide by Σ w_i, over the base model too where that is listed."""
    method = rule.method
    scalar = all(is_number(weight) and abs(weight) < LARGE for weight in weights)
    total = sum(weights) if scalar else 0.0
    if method == "linear":
        own = sum(w for w, model in zip(weights, models, strict=True) if model.adapter is not None) if scalar else 0.0
        if not normalize and not (scalar and abs(total - 1) < 1e-9):
            draft.wrong(
                ("parameters", "normalize"),
                "is false, and the weights do not add up to 1: mergekit then scales the base model itself, which no adapter "
                "can do; set it to true, or take task_arithmetic",
            )
        elif any(model.adapter is None for model in models) and not scalar:
            draft.wrong(
                ("models",), "list the base model, and weights that differ by module; give it no place, or numbers"
            )
        elif normalize and scalar and min(abs(own), abs(total)) < 1e-8:
            draft.wrong(
                ("models",), "have weights that add up to 0, so that they cannot be normalized; change a weight"
            )
        elif normalize and own != total:
            return method, {**parameters, "lambda": own / total}
        return method, parameters if normalize else {**parameters, "normalize": False}
    if not normalize:
        return method, parameters
    if method == "task_arithmetic":
        return "linear", parameters
    if not scalar:
        draft.wrong(
            ("parameters", "normalize"), f"is true with weights that differ by module, which {method} does not do"
        )
    factor = parameters["lambda"]
    if not is_number(factor) or abs(factor) > LARGE:
        draft.wrong(("parameters", "lambda"), f"is {shown(factor)}; with normalize: true allowed is a number")
        return method, parameters
    return method, {**parameters, "lambda": factor / (total if abs(total) > 1e-8 else 1.0)}


def _tell(draft: Draft, rule: Rule, config: Values) -> None:
    method = config["merge_method"]
    if rule.whole_weights or (rule.method in ("nuslerp", "multislerp") and "base_model" not in config):
        draft.note(
            f"{method} in mergekit turns whole weights W0 + ΔW, whose result is no LoRA; here it turns the ΔW: other numbers"
        )
    if rule.method.startswith(("dare", "della")):
        draft.note("which entries are dropped is drawn by this recipe's seed; the same rule, other draws")
    if method == "ties":
        draft.note(
            "mergekit's ties keeps ⌊density · entries⌋ entries of every module: that is breadcrumbs_ties with gamma 0; `ties` "
            "here trims over the whole model unless told otherwise, as the paper does"
        )
    if method == "model_stock":
        draft.note(
            "reverse: true turns the mean of adapters around that turn away from each other, as mergekit does, by a factor that has no "
            "bound near where they cancel each other; without it such modules get nothing"
        )
    draft.note("mergekit writes a whole model; the result here is a LoRA adapter, cut to the server's rank (`rank`)")
