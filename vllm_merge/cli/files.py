# SPDX-License-Identifier: Apache-2.0
"""What several commands do first: read the recipe file, look at its adapters, and make a plan."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from vllm_merge.adapters.base_fit import misfit, read_base_shapes, tied_weight, unknown_modules
from vllm_merge.adapters.base_model import base_model_folder, base_model_hash
from vllm_merge.adapters.catalogue import Catalogue
from vllm_merge.cli.output import ProgressBar
from vllm_merge.errors import MergeError, UserInputError
from vllm_merge.methods.registry import default_registry
from vllm_merge.recipe.continuation import check_states
from vllm_merge.recipe.dtypes import Dtype
from vllm_merge.recipe.file import RecipeFile, begins_as_path, is_local
from vllm_merge.recipe.plan import AdapterSource, Plan, make_plan
from vllm_merge.recipe.problems import listed
from vllm_merge.recipe_files import load_recipes


@dataclass(frozen=True)
class Planned:
    """A plan, the file it is from, the adapters it reads, and what is worth knowing before it runs."""

    file: RecipeFile
    catalogue: Catalogue
    plan: Plan
    warnings: list[str]


def register_all(file: RecipeFile, names: Collection[str] | None = None, bar: ProgressBar | None = None) -> Catalogue:
    """The adapters of the file (only `names`, where given). Raises UserInputError with a line for each wrong one."""
    catalogue = Catalogue()
    problems = []
    for index, name in enumerate(names := file.adapters if names is None else names):
        if bar is not None:
            bar.update(f"Reading {name}", index, len(names))
        try:
            catalogue.register(name, file.adapters[name].path, file.adapters[name].revision)
        except MergeError as error:
            problems.append(f"{file.place('adapters', name, 'path')}: {error}")
    if problems:
        raise UserInputError("\n".join(problems))
    return catalogue


def check_fit(model: str, catalogue: Catalogue) -> list[str]:
    """Raise UserInputError, with a line for each, where adapters cannot be of the model; return what else is odd.

    A model that is not on this machine is not checked.
    """
    folder = base_model_folder(model)
    if folder is None:
        return []
    base = read_base_shapes(folder)
    problems, odd = [], []
    for name in catalogue.names():
        modules, embeddings = catalogue.get(name).shapes, catalogue.get(name).embeddings
        if reason := misfit(base, modules, embeddings):
            problems.append(f"adapter {name!r} does not fit the base model: {reason}")
        elif (unknown := unknown_modules(base, modules)) and len(unknown) == len(modules):
            odd.append(f"adapter {name!r}: {folder} has no weight of that name for any of its modules ({unknown[0]} …)")
        elif tied := tied_weight(base, modules, embeddings):
            odd.append(f"adapter {name!r}: {tied}")
    if problems:
        raise UserInputError("\n".join(problems))
    return odd


def check_base_model(model: str, where: str) -> None:
    """Refuse what can only be a path, and leads nowhere. where: what named it, for the message."""
    if begins_as_path(model) and not Path(model).expanduser().exists():
        raise UserInputError(f"{where}: there is no {model}; give the folder of the base model, or its Hub name")


def planned(path: Path, name: str | None, dtype: Dtype, max_rank: int | None, bar: ProgressBar) -> Planned:
    """The plan for `name` of the recipe file, or for its only recipe."""
    file = load_recipes(path)
    chosen = file.target(name) if name is not None else _only_recipe(file)
    used = adapters_of(file, chosen)
    if file.base_model:
        check_base_model(file.base_model, file.place("base_model"))
    catalogue = register_all(file, used, bar)
    odd = check_fit(file.base_model, catalogue) if file.base_model else []
    hashes = {}
    for index, adapter in enumerate(used):
        bar.update(f"Hashing {adapter}", index, len(used))
        hashes[adapter] = catalogue.content_hash(adapter)
    file = file.with_paths(catalogue.paths())
    if chosen in file.recipes:
        check_states(file, file.stage_order(chosen), lambda adapter: catalogue.get(adapter).continues)
    plan = make_plan(
        file,
        chosen,
        registry=default_registry(),
        adapter_hashes=hashes,
        base_model_hash=base_model_hash(file.base_model) if file.base_model else "",
        max_rank=max_rank,
        dtype=dtype,
    )
    return Planned(file, catalogue, plan, odd + _warnings(file, catalogue, plan))


def adapters_of(file: RecipeFile, name: str) -> list[str]:
    """The registered adapters that `name` is made from: itself, or those of its recipe and the recipes that it uses."""
    if name not in file.recipes:
        return [name]
    inputs = [source for stage in file.stage_order(name) for source in file.recipes[stage].sources]
    return [adapter for adapter in dict.fromkeys(inputs) if adapter not in file.recipes]


def _only_recipe(file: RecipeFile) -> str:
    if len(file.recipes) != 1:
        known = listed(file.recipes)
        raise UserInputError(f"{file.path}: has {len(file.recipes)} recipes ({known}); say which one, by its NAME")
    return next(iter(file.recipes))


def _warnings(file: RecipeFile, catalogue: Catalogue, plan: Plan) -> list[str]:
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
    elif file.base_model and not is_local(file.base_model):
        for base, names in bases.items():
            if not is_local(base) and base != file.base_model:
                found.append(f"the file's base_model is {file.base_model}, and {', '.join(names)} name {base}")
    for stage in plan.stages:
        reads = [item.source.adapter for item in stage.inputs if isinstance(item.source, AdapterSource)]
        repeated = sorted({name for name in reads if reads.count(name) > 1})
        found += [f"recipe {stage.name!r} lists the adapter {name!r} more than once" for name in repeated]
    if file.base_model is None and plan.stages:
        found.append("the file names no base_model, so the digest does not cover one")
    return found
