# SPDX-License-Identifier: Apache-2.0
"""`continue`: a recipe that goes on from an earlier result of the same sequential method.

What is continued stands first among the inputs, and the method's parameter `resume` is set.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from vllm_merge.errors import UserInputError
from vllm_merge.recipe.file import RecipeFile
from vllm_merge.recipe.problems import Finding, KeyPath, listed, nearest
from vllm_merge.recipe.protocols import Registry
from vllm_merge.recipe.schema import RecipeDocument

RESUME = "resume"


def continuations(
    document: RecipeDocument, name: str, registry: Registry, known: Mapping[str, None]
) -> Iterator[Finding]:
    """What is wrong with `continue` of a recipe, as far as the file tells. known: names of adapters and recipes."""
    recipe = document.recipes[name]
    earlier, path = recipe.continued, ("recipes", name, "continue")
    sequential = [other for other in registry.names() if _resumes(registry, other)]
    if earlier is None or recipe.merge_method not in registry.names():
        return
    if recipe.merge_method not in sequential:
        yield (
            path,
            f"{recipe.merge_method!r} cannot go on from an earlier result; methods that can: {listed(sequential)}",
        )
    elif earlier in document.aliases:
        yield path, f"{earlier!r} is an alias, which may move; name what it points to, {document.aliases[earlier]!r}"
    elif earlier not in known:
        others = [other for other in known if other != name]
        hint = nearest(earlier, others)
        yield path, f"no registered adapter or recipe {earlier!r}{hint} (known: {listed(others)})"
    elif earlier in document.recipes and document.recipes[earlier].merge_method != recipe.merge_method:
        other = document.recipes[earlier].merge_method
        yield (
            path,
            f"{earlier!r} is a recipe of {other!r}, and {recipe.merge_method!r} goes on from results of its own alone; "
            "list it under `adapters` to merge it like any other",
        )
    if RESUME in recipe.parameters:
        here: KeyPath = ("recipes", name, "parameters", RESUME)
        yield here, "is set by `continue`; remove one of the two"
    if recipe.precondition:
        here = ("recipes", name, "precondition")
        yield (
            here,
            "would change what is continued as well; leave it out, or merge all adapters anew without `continue`",
        )


def _resumes(registry: Registry, method: str) -> bool:
    return any(parameter.name == RESUME for parameter in registry.get(method).parameters)


def check_digits(file: RecipeFile, names: Sequence[str], digest_of: Callable[[str], str]) -> None:
    """Raise UserInputError where one of the recipes `names` continues NAME@DIGITS, and NAME has another digest now."""
    for name in names:
        earlier, digits = file.recipes[name].continued, (file.recipes[name].continues or "").partition("@")[2]
        if earlier is not None and digits and not (digest := digest_of(earlier)).startswith(digits):
            raise UserInputError(
                f"{file.place('recipes', name, 'continue')}: {earlier!r} is {earlier}@{digest[:12]} now, not "
                f"{earlier}@{digits}: its recipe, its adapters, or the server's rank or dtype changed; write the new digits, "
                "or register the folder that the earlier result was saved to"
            )


def check_states(file: RecipeFile, names: Iterable[str], state_of: Callable[[str], str | None]) -> None:
    """Raise UserInputError where one of the recipes `names` continues an adapter that carries no state of its method.

    state_of: the method whose state a registered adapter carries, or None.
    """
    for name in names:
        recipe = file.recipes[name]
        if recipe.continued is None or recipe.continued in file.recipes:
            continue
        if (found := state_of(recipe.continued)) != recipe.merge_method:
            carries = "carries no state of a sequential merge" if found is None else f"carries the state of {found!r}"
            raise UserInputError(
                f"{file.place('recipes', name, 'continue')}: adapter {recipe.continued!r} {carries}, so "
                f"{recipe.merge_method!r} cannot go on from it; give a folder that vllm-merge wrote for that method, with its "
                "merge_report.json, or merge all adapters anew without `continue`"
            )
