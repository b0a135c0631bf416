# SPDX-License-Identifier: Apache-2.0
"""The models of a mergekit configuration: one base, and an adapter on each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_merge.convert.draft import Draft
from vllm_merge.recipe.problems import KeyPath
from vllm_merge.recipe.values import shown

FORM = "expected `base+lora`, or {model: base, lora: lora}, each with @revision if need be"


@dataclass(frozen=True)
class Model:
    """An item of `models`. adapter: its name, None for the base model alone."""

    index: int
    adapter: str | None
    parameters: Mapping[str, Any]


@dataclass(frozen=True)
class _Part:
    """What of a reference is a model, or an adapter."""

    path: str
    revision: str | None

    @classmethod
    def of(cls, value: object) -> _Part | None:
        """From `path`, `path@revision` or {path, revision}."""
        if isinstance(value, dict) and isinstance(value.get("path"), str) and value.keys() <= {"path", "revision"}:
            return cls(value["path"], value.get("revision"))
        if not isinstance(value, str) or not value:
            return None
        path, _, revision = value.partition("@")
        return cls(path, revision or None)


def read_models(
    draft: Draft, config: Mapping[str, Any], *, skips_base: bool, counts_base: bool, pair: bool
) -> tuple[str | None, list[Model]]:
    """The base model and the items of `models`, of a pair the base_model first.

    skips_base: the method takes no notice of the base model among the models; counts_base: it does, by its weight. pair: it
    goes from the base_model, one of the models with its adapter, to the other.
    """
    listed = config.get("models")
    if not isinstance(listed, list) or not listed:
        if "slices" not in config and "modules" not in config:
            draft.wrong(
                ("models",), f"is {shown(listed)}; expected a list of items {{model: base+lora, parameters: …}}"
            )
        return None, []
    named = _reference(draft, ("base_model",), config["base_model"]) if config.get("base_model") else None
    base = None if named is None else named[0]
    first: Model | None = None
    models: list[Model] = []
    for index, item in enumerate(listed):
        path: KeyPath = ("models", index)
        entry = draft.mapping(path, item)
        draft.known_keys(path, entry, ("model", "parameters"))
        found = _reference(draft, (*path, "model"), entry.get("model"))
        if found is None:
            continue
        base = base or found[0]
        if found[0].path != base.path:
            draft.wrong(
                (*path, "model"),
                f"is on {found[0].path}, others on {base.path}; adapters of one base model can be merged, whole models not",
            )
        parameters = draft.mapping((*path, "parameters"), entry.get("parameters") or {})
        if found[1] is None:
            if skips_base:
                draft.note(
                    f"the base model among the models is left out: its weight change is 0, and {_method(config)} skips it"
                )
                continue
            if not counts_base:
                draft.wrong((*path, "model"), f"is {found[0].path} without an adapter; {FORM}")
        adapter = None if found[1] is None else draft.register(found[1].path, found[1].revision)
        model = Model(index, adapter, parameters)
        if named is not None and named[1] is not None and found == named:
            first = model
        models.append(model)
    if named is not None and named[1] is not None and not pair:
        draft.wrong(
            ("base_model",), "has an adapter; what is merged is changes of the base model itself: leave `+…` out"
        )
    if pair and first is None and named is not None:
        draft.wrong(
            ("base_model",),
            f"is none of the models with their adapters; for {_method(config)} it is the model at t = 0: list it among the models",
        )
    ordered = models if first is None else [first, *(model for model in models if model is not first)]
    if base is not None and base.revision is not None:
        draft.note(
            f"the revision {base.revision} of the base model is left out: the server, or the digest, knows its weights"
        )
    if base is not None and base.path.startswith("."):
        draft.note("relative paths are taken from the folder of the recipe file")
    return None if base is None else base.path, ordered


def _method(config: Mapping[str, Any]) -> str:
    return str(config.get("merge_method"))


def _reference(draft: Draft, path: KeyPath, value: object) -> tuple[_Part, _Part | None] | None:
    """Base model and adapter; reports a value of another form."""
    model: object = value
    lora: object = None
    if isinstance(value, str):
        model, _, lora = value.partition("+")
    elif isinstance(value, dict) and value.keys() <= {"model", "lora"}:
        model, lora = value.get("model"), value.get("lora")
    base, adapter = _Part.of(model), _Part.of(lora) if lora else None
    if base is None or (lora and adapter is None):
        draft.wrong(path, f"is {shown(value)}; {FORM}")
        return None
    return base, adapter
