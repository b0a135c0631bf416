# SPDX-License-Identifier: Apache-2.0
"""What several commands do first: read the recipe file, look at its adapters, and make a plan."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_merge.cli.output import ProgressBar
from vllm_merge.errors import UserInputError
from vllm_merge.recipe.file import RecipeFile
from vllm_merge.recipe.loading import load_recipes
from vllm_merge.recipe.plan import AdapterSource, Dtype, Plan, make_plan
from vllm_merge.recipe.problems import listed

if TYPE_CHECKING:
    from vllm_merge.adapters.catalogue import Catalogue


@dataclass(frozen=True)
class Planned:
    """A plan, the file it is from, the adapters it reads, and what is worth knowing before it runs."""

    file: RecipeFile
    catalogue: "Catalogue"
    plan: Plan
    warnings: list[str]


def read_recipes(path: Path) -> RecipeFile:
    """The recipe file, checked against the built-in and installed methods."""
    from vllm_merge.methods.registry import default_registry

    return load_recipes(path, default_registry())


def planned(path: Path, name: str | None, dtype: Dtype, max_rank: int | None, bar: ProgressBar) -> Planned:
    """The plan for `name` of the recipe file, or for its only recipe."""
    from vllm_merge.adapters.base_model import base_model_hash
    from vllm_merge.adapters.catalogue import Catalogue
    from vllm_merge.methods.registry import default_registry

    file = read_recipes(path)
    chosen = file.target(name) if name is not None else _only_recipe(file)
    used = _adapters_of(file, chosen)
    catalogue = Catalogue()
    hashes = {}
    for index, adapter in enumerate(used):
        bar.update(f"Reading {adapter}", index, len(used))
        catalogue.register(adapter, file.adapters[adapter].path, file.adapters[adapter].revision)
        hashes[adapter] = catalogue.content_hash(adapter)
    file = file.with_paths(catalogue.paths())
    plan = make_plan(
        file,
        chosen,
        registry=default_registry(),
        adapter_hashes=hashes,
        base_model_hash=base_model_hash(file.base_model) if file.base_model else "",
        max_rank=max_rank,
        dtype=dtype,
    )
    return Planned(file, catalogue, plan, _warnings(file, catalogue, plan))


def _only_recipe(file: RecipeFile) -> str:
    if len(file.recipes) != 1:
        known = listed(file.recipes)
        raise UserInputError(f"{file.path}: has {len(file.recipes)} recipes ({known}); say which one, by its NAME")
    return next(iter(file.recipes))


def _adapters_of(file: RecipeFile, name: str) -> list[str]:
    if name not in file.recipes:
        return [name]
    inputs = [item.adapter for stage in file.stage_order(name) for item in file.recipes[stage].adapters]
    return [adapter for adapter in dict.fromkeys(inputs) if adapter not in file.recipes]


def _warnings(file: RecipeFile, catalogue: "Catalogue", plan: Plan) -> list[str]:
    found = []
    bases: dict[str, list[str]] = {}
    for name in plan.adapters:
        summary = catalogue.get(name).summary
        found += [f"adapter {name!r}: {warning}" for warning in summary.warnings]
        if summary.base_model is not None:
            bases.setdefault(summary.base_model, []).append(name)
    if len(bases) > 1:
        named = "; ".join(f"{base}: {', '.join(names)}" for base, names in bases.items())
        found.append(f"the adapters name different base models, and only adapters of one base can be merged ({named})")
    for stage in plan.stages:
        reads = [item.source.adapter for item in stage.inputs if isinstance(item.source, AdapterSource)]
        repeated = sorted({name for name in reads if reads.count(name) > 1})
        found += [f"recipe {stage.name!r} lists the adapter {name!r} more than once" for name in repeated]
    if file.base_model is None and plan.stages:
        found.append("the file names no base_model, so the digest does not cover one")
    return found
