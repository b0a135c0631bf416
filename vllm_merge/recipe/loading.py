# SPDX-License-Identifier: Apache-2.0
"""Reading a recipe file: every mistake in it with its line, several at a time."""

from collections.abc import Collection, Mapping
from itertools import islice
from pathlib import Path

from pydantic import ValidationError

from vllm_merge.errors import UserInputError
from vllm_merge.recipe.checks import check_document
from vllm_merge.recipe.file import RecipeFile, absolute_path, base_model_path
from vllm_merge.recipe.hints import message
from vllm_merge.recipe.problems import KeyPath, Problem, RecipeError, dotted
from vllm_merge.recipe.protocols import CheckPrecondition, Registry
from vllm_merge.recipe.schema import RecipeDocument
from vllm_merge.recipe.yaml_tree import YamlTree, parse_yaml, read_yaml

MAX_FINDINGS = 200  # a file with more mistakes than that is not looked through to its end


def knows_none(precondition: Mapping[str, Mapping[str, object]]) -> None:
    """Refuse any precondition."""
    raise UserInputError(f"unknown precondition {next(iter(precondition))!r} (known: none)")


def load_recipes(
    path: str | Path,
    registry: Registry,
    *,
    registered: Collection[str] = (),
    check_precondition: CheckPrecondition = knows_none,
) -> RecipeFile:
    """Read and check the recipe file `path`. Raises RecipeError, which lists every mistake with its line.

    registry: the merge methods; registered: names of adapters that are known beside the file's (vLLM's --lora-modules);
    check_precondition: of what recipes list under `precondition`; without one, none is known.
    """
    file = Path(path)
    return _checked(read_yaml(file), file, registry, registered, check_precondition)


def parse_recipes(
    text: str,
    file: Path,
    registry: Registry,
    *,
    registered: Collection[str] = (),
    check_precondition: CheckPrecondition = knows_none,
) -> RecipeFile:
    """`load_recipes` of the content `text`; `file` gives the name for messages and the folder of relative paths."""
    return _checked(parse_yaml(text, file), file, registry, registered, check_precondition)


def problems_of(
    text: str,
    file: Path,
    registry: Registry,
    *,
    registered: Collection[str] = (),
    check_precondition: CheckPrecondition = knows_none,
) -> tuple[Problem, ...]:
    """Every mistake in a recipe file of this content. Nothing that it names is looked for on this machine."""
    try:
        _document(parse_yaml(text, file), file, registry, registered, check_precondition, None)
    except RecipeError as error:
        return error.problems
    return ()


def _checked(
    tree: YamlTree,
    file: Path,
    registry: Registry,
    registered: Collection[str],
    check_precondition: CheckPrecondition,
) -> RecipeFile:
    document = _document(tree, file, registry, registered, check_precondition, file.parent)
    adapters = {
        name: entry.model_copy(update={"path": absolute_path(entry.path, file.parent)})
        for name, entry in document.adapters.items()
    }
    base_model = base_model_path(document.base_model, file.parent) if document.base_model else None
    named: list[KeyPath] = [
        *([("base_model",)] if document.base_model else []),
        *(("adapters", name, "path") for name in document.adapters),
        *(("recipes", name, "continue") for name, recipe in document.recipes.items() if recipe.continues),
        *(("experiments", name) for name in document.experiments),
    ]
    return RecipeFile(
        file,
        base_model,
        adapters,
        document.recipes,
        document.aliases,
        document.experiments,
        {dotted(path): tree.line(path) for path in named},
    )


def _document(
    tree: YamlTree,
    file: Path,
    registry: Registry,
    registered: Collection[str],
    check_precondition: CheckPrecondition,
    directory: Path | None,
) -> RecipeDocument:
    """directory: where relative paths are taken from; None: paths are not looked at."""
    if not isinstance(tree.data, dict):
        raise RecipeError(file, [Problem((), 1, "is not a mapping; a recipe file begins with `version: 1`")])
    try:
        document = RecipeDocument.model_validate(tree.data)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=True)
        findings = [message(details) for details in errors[:MAX_FINDINGS]]
    else:
        found = check_document(document, registry, registered, check_precondition, directory)
        findings = list(islice(found, MAX_FINDINGS))
    if findings:
        raise RecipeError(file, [Problem(path, tree.line(path), text) for path, text in findings])
    return document
