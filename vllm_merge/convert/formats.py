# SPDX-License-Identifier: Apache-2.0
"""Which format a file is in, and its conversion: the recipe is read back before it is handed out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from vllm_merge.convert.draft import Draft
from vllm_merge.convert.lorax import from_lorax
from vllm_merge.convert.mergekit import from_mergekit
from vllm_merge.convert.peft import from_peft
from vllm_merge.convert.written import Converted
from vllm_merge.errors import UserInputError
from vllm_merge.recipe.loading import parse_recipes
from vllm_merge.recipe.problems import Problem, RecipeError
from vllm_merge.recipe.protocols import CheckPrecondition, Registry
from vllm_merge.recipe.values import NAME, NAME_RULE
from vllm_merge.recipe.yaml_tree import read_yaml

FORMATS: dict[str, Callable[[Draft], Converted]] = {"mergekit": from_mergekit, "peft": from_peft, "lorax": from_lorax}


def convert(
    path: str | Path,
    registry: Registry,
    check_precondition: CheckPrecondition,
    *,
    source: str | None = None,
    name: str = "merged",
    adapters: Mapping[str, str] | None = None,
) -> Converted:
    """The recipe file that a merge of mergekit, PEFT or LoRAX becomes. JSON is read as the YAML that it is.

    source: the format, one of FORMATS; by its keys unless given. name: of the recipe. adapters: paths by the names or ids
    that the file has. Raises RecipeError, with a line for each part that is wrong or has no meaning here.
    """
    file = Path(path)
    if NAME.fullmatch(name) is None:
        raise UserInputError(f"the name of the recipe is {name!r}; a name is {NAME_RULE}")
    draft = Draft(read_yaml(file), file, name, adapters or {})
    converted = FORMATS[source or _recognised(draft)](draft)
    try:
        parse_recipes(converted.to_yaml(), file, registry, check_precondition=check_precondition)
    except RecipeError as error:
        raise RecipeError(file, [_at_its_source(draft, problem) for problem in error.problems]) from None
    return converted


def _recognised(draft: Draft) -> str:
    keys = draft.tree.data if isinstance(draft.tree.data, dict) else {}
    inner = keys.get("parameters")
    if "merged_adapters" in keys or (isinstance(inner, dict) and "merged_adapters" in inner) or "ids" in keys:
        return "lorax"
    if "merge_method" in keys:
        return "mergekit"
    if "combination_type" in keys or ("adapters" in keys and "weights" in keys):
        return "peft"
    raise UserInputError(
        f"{draft.file}: is in no format that is known by its keys; allowed are a mergekit configuration (merge_method, models), "
        "the arguments of PEFT's add_weighted_adapter (adapters, weights, combination_type), and a LoRAX request "
        "(merged_adapters); say which by --from"
    )


def _at_its_source(draft: Draft, problem: Problem) -> Problem:
    """The problem of the recipe at the line and key of the source that it is from, where that is known."""
    path = problem.path[2:]
    while path and path not in draft.origin:
        path = path[:-1]
    source = draft.origin.get(path, ())
    return Problem(source, draft.tree.line(source), problem.message)
