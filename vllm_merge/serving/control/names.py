# SPDX-License-Identifier: Apache-2.0
"""From a recipe file to names and plans: what every model name of ours stands for on this server."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vllm_merge.adapters.catalogue import Catalogue
from vllm_merge.errors import MergeError, UserInputError
from vllm_merge.methods.registry import default_registry
from vllm_merge.recipe.adhoc import AdHocError, Limits, Written, check_written
from vllm_merge.recipe.continuation import check_states
from vllm_merge.recipe.experiments import Experiment
from vllm_merge.recipe.file import RecipeFile
from vllm_merge.recipe.plan import Plan, make_adapter_plan, make_plan
from vllm_merge.recipe.safety import refusal
from vllm_merge.recipe.schema import AdapterEntry
from vllm_merge.recipe_files import check_precondition, load_recipes
from vllm_merge.serving.control.another_base import another_base
from vllm_merge.serving.experiments.arm_slots import check_slots

logger = logging.getLogger("vllm_merge")

MAX_ADAPTERS = 64  # inputs of a recipe that a request adds or has planned


@dataclass(frozen=True)
class Name:
    """What a model name stands for: an artifact, or the reason why it has none.

    label: `recipe@digest`, what answers call the artifact. Recipes of equal content share an artifact but not a label.
    on_miss, fallback: the recipe's, for requests while the artifact is not in memory.
    """

    name: str
    kind: str  # recipe | alias | adapter | experiment
    digest: str | None
    label: str = ""
    reason: str = ""
    on_miss: str = "wait"
    fallback: str | None = None


@dataclass(frozen=True)
class Names:
    """Everything that one reading of the recipe file gave. warnings: of adapters, by name, where there are any."""

    recipes: RecipeFile
    names: Mapping[str, Name]
    plans: Mapping[str, Plan]  # by digest
    warnings: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def resolve_names(
    config: Path,
    facts: Mapping[str, Any],
    catalogue: Catalogue,
    registered: Mapping[str, str],
    added: Mapping[str, Any] | None = None,
) -> Names:
    """Read a recipe file and plan every name in it for a server with these facts (a worker's answer to `hello`).

    registered: {name: folder} of the adapters that vLLM was given itself; the file's own entries of a name come first.
    added: {name: recipe} that requests brought; a recipe of the file with such a name comes first.
    Raises UserInputError if the file is wrong. An adapter that cannot be read only takes its own names with it.
    """
    recipes = load_recipes(config, registered=registered)
    free = {name: path for name, path in registered.items() if name not in recipes.adapters}
    recipes = recipes.with_adapters({name: AdapterEntry(path=path, revision=None) for name, path in free.items()})
    registry = default_registry()
    recipes = _with_recipes(recipes, added or {}, facts["max_lora_rank"])
    hashes: dict[str, str] = {}
    broken: dict[str, str] = {}
    warnings: dict[str, tuple[str, ...]] = {}
    for name, source in recipes.adapters.items():
        try:
            warnings |= _warnings(catalogue, name, source, facts)
            hashes[name] = catalogue.content_hash(name)
        except MergeError as error:
            broken[name] = str(error)
            logger.error("adapter %s cannot be served: %s", name, error)
    recipes = recipes.with_paths(catalogue.paths())
    names: dict[str, Name] = {}
    plans: dict[str, Plan] = {}

    def add(name: str, kind: str, make: Callable[..., Plan], **more: Any) -> None:
        reasons = missing_adapters(recipes, name, broken)
        try:
            if reasons:
                raise MergeError("; ".join(reasons))
            if unsafe := refusal(recipes.recipes, name):
                raise MergeError(unsafe)
            if kind == "recipe":
                check_states(recipes, recipes.stage_order(name), lambda adapter: catalogue.get(adapter).continues)
            plan = make(recipes, name, adapter_hashes=hashes, **server, **more)
        except MergeError as error:
            if not reasons:  # which the log has
                logger.error("%s %s cannot be served: %s", kind, name, error)
            names[name] = Name(name, kind, None, reason=str(error))
            return
        plans[plan.digest] = plan
        names[name] = Name(name, kind, plan.digest, plan.artifact_name)

    server = {"base_model_hash": facts["base_model_hash"], "dtype": facts["dtype"], "max_rank": facts["max_lora_rank"]}
    for name in recipes.recipes:
        add(name, "recipe", make_plan, registry=registry)
    for name in recipes.adapters:
        if name in broken and name in free:
            continue  # vLLM may be able to serve what we cannot merge
        add(name, "adapter", make_adapter_plan)
    for name, recipe in recipes.recipes.items():
        names[name] = replace(names[name], on_miss=recipe.on_miss, fallback=recipe.fallback)
    for alias, target in recipes.aliases.items():
        names[alias] = replace(names[target], name=alias, kind="alias")
    if recipes.experiments:
        check_slots(recipes, names, facts["max_loras"], datetime.now(UTC))
    for name, experiment in recipes.experiments.items():
        names[name] = _of_experiment(name, experiment, names)
    return Names(recipes, names, plans, warnings)


def _warnings(
    catalogue: Catalogue, name: str, source: AdapterEntry, facts: Mapping[str, Any]
) -> dict[str, tuple[str, ...]]:
    """Register an adapter, and say what differs from the base model that it was trained on; what is new goes to the log, too."""
    before = catalogue.get(name) if name in catalogue.names() else None
    adapter = catalogue.register(name, source.path, source.revision)
    found = another_base(adapter, facts["base_model"], facts["base_revision"])
    if adapter != before:
        for warning in found:
            logger.warning("adapter %s: %s", name, warning)
    return {name: found} if found else {}


def _with_recipes(file: RecipeFile, added: Mapping[str, Any], max_rank: int) -> RecipeFile:
    limits = Limits(max_rank, MAX_ADAPTERS)
    for name, given in added.items():
        if name in file.recipes:
            continue
        try:
            recipe = check_written(Written(given), file, default_registry(), check_precondition, limits)
        except AdHocError as error:
            raise UserInputError(
                f"{file.path}: recipe {name!r}, which a request added, does not go with this file: {error}; mend the file, or "
                f"remove the recipe: DELETE /v1/merge/recipes/{name}"
            ) from None
        file = file.with_recipe(name, recipe)
    return file


def _of_experiment(name: str, experiment: Experiment, names: Mapping[str, Name]) -> Name:
    """What stands for the experiment where nobody is assigned (in lists): control, or the first arm that is not the base."""
    arms = [experiment.arms[experiment.control_arm], *experiment.arms.values()]
    known = next((names[arm.serve] for arm in arms if arm.serve in names and names[arm.serve].digest is not None), None)
    if known is None:
        return Name(name, "experiment", None, reason="none of its arms has an artifact")
    return Name(name, "experiment", known.digest, known.label)


def missing_adapters(recipes: RecipeFile, name: str, broken: Mapping[str, str]) -> list[str]:
    """Why a name's adapters, or those of the recipes it uses, cannot be read; empty if they can."""
    used = {name}
    if name in recipes.recipes:
        used.update(source for stage in recipes.stage_order(name) for source in recipes.recipes[stage].sources)
    return [broken[adapter] for adapter in sorted(used) if adapter in broken]
