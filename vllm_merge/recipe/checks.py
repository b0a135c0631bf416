# SPDX-License-Identifier: Apache-2.0
"""What a recipe file says must hold together: names, references, methods and their parameters."""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from vllm_merge.errors import UserInputError
from vllm_merge.recipe.continuation import continuations
from vllm_merge.recipe.experiment_checks import check_experiments
from vllm_merge.recipe.file import absolute_path, is_local
from vllm_merge.recipe.problems import Finding, KeyPath, listed, nearest, suggested
from vllm_merge.recipe.protocols import CheckPrecondition, MethodSpec, Registry
from vllm_merge.recipe.resolve import scalars, varies
from vllm_merge.recipe.schema import BASE, Recipe, RecipeDocument
from vllm_merge.recipe.values import NAME, NAME_RULE, shown


def check_document(
    document: RecipeDocument,
    registry: Registry,
    registered: Collection[str],
    check_precondition: CheckPrecondition,
    directory: Path | None,
) -> Iterator[Finding]:
    """Every (key, message) that is wrong. `registered`: names of adapters that are known from elsewhere;
    `directory`: where relative paths are taken from; None: paths are not looked at."""
    known = dict.fromkeys([*document.adapters, *registered, *document.recipes])
    yield from _names(document, registered)
    if directory is not None:
        yield from _adapters(document, directory)
    yield from _aliases(document, registered)
    for name in document.recipes:
        yield from check_recipe(document, name, registry, known, check_precondition)
    yield from _cycles(document.recipes)
    yield from check_experiments(document, registered)


def check_recipe(
    document: RecipeDocument,
    name: str,
    registry: Registry,
    known: Mapping[str, None],
    check_precondition: CheckPrecondition,
) -> Iterator[Finding]:
    """Every (key, message) that is wrong with one recipe of a document, but not circles of several. known: names of
    adapters and recipes."""
    recipe = document.recipes[name]
    yield from _method(("recipes", name), recipe, registry)
    yield from _references(document, name, recipe, known)
    yield from continuations(document, name, registry, known)
    yield from _serving(document, name, recipe, known)
    for index, precondition in enumerate(recipe.precondition):
        try:
            check_precondition(precondition)
        except UserInputError as error:
            yield ("recipes", name, "precondition", index), str(error)


def _names(document: RecipeDocument, registered: Collection[str]) -> Iterator[Finding]:
    owners = dict.fromkeys(registered, "a registered adapter")
    kinds = {"adapters": "an adapter", "recipes": "a recipe", "aliases": "an alias", "experiments": "an experiment"}
    for section, kind in kinds.items():
        for name in getattr(document, section):
            if not NAME.fullmatch(name):
                yield (section, name), f"{name!r} is not a name; a name is {NAME_RULE}"
            elif name in owners:
                yield (section, name), f"the name {name!r} is that of {owners[name]} too; rename one of the two"
            else:
                owners[name] = kind


def _adapters(document: RecipeDocument, directory: Path) -> Iterator[Finding]:
    for name, entry in document.adapters.items():
        local = is_local(absolute_path(entry.path, directory))
        if entry.revision is not None and local:
            message = f"{entry.path} is a folder; a revision is for Hub repositories (org/name) only"
            yield ("adapters", name, "revision"), message
        elif entry.revision is None and not local:
            message = (
                f"is missing; {entry.path} is no folder here, and a Hub repository needs a revision: "
                "best a commit, which never changes"
            )
            yield ("adapters", name, "revision"), message


def _aliases(document: RecipeDocument, registered: Collection[str]) -> Iterator[Finding]:
    known = dict.fromkeys([*document.recipes, *document.adapters, *registered])
    for name, target in document.aliases.items():
        if target in document.aliases:
            yield ("aliases", name), f"{target!r} is an alias; aliases point to recipes or adapters"
        elif target not in known:
            yield ("aliases", name), f"no recipe or adapter {target!r}{suggested(target, known)}"


def _references(document: RecipeDocument, name: str, recipe: Recipe, known: Mapping[str, None]) -> Iterator[Finding]:
    for index, item in enumerate(recipe.adapters):
        path: KeyPath = ("recipes", name, "adapters", index, "adapter")
        if item.adapter in document.aliases:
            target = document.aliases[item.adapter]
            yield path, f"{item.adapter!r} is an alias, which may move; name what it points to, {target!r}"
        elif item.adapter not in known:
            others = [other for other in known if other != name]
            hint = nearest(item.adapter, others)
            yield path, f"no registered adapter or recipe {item.adapter!r}{hint} (known: {listed(others)})"


def _serving(document: RecipeDocument, name: str, recipe: Recipe, known: Mapping[str, None]) -> Iterator[Finding]:
    """What is said about serving: the stand-in, and a start that fails."""
    path: KeyPath = ("recipes", name)
    others = [other for other in known if other != name]
    wanted = recipe.fallback
    if wanted is None:
        if recipe.on_miss == "fallback":
            yield (*path, "fallback"), f"is missing; name a recipe, an adapter or {BASE!r} (known: {listed(others)})"
    elif recipe.on_miss != "fallback":
        yield (
            (*path, "fallback"),
            f"has no effect with `on_miss: {recipe.on_miss}`; write `on_miss: fallback` or leave it out",
        )
    elif wanted == name:
        yield (*path, "fallback"), "is the recipe itself; name another recipe, an adapter or the base model"
    elif wanted in document.aliases:
        target = document.aliases[wanted]
        yield (*path, "fallback"), f"{wanted!r} is an alias, which may move; name what it points to, {target!r}"
    elif wanted not in known and wanted != BASE:
        hint = nearest(wanted, [*others, BASE])
        yield (*path, "fallback"), f"no recipe or adapter {wanted!r}{hint} (known: {listed([*others, BASE])})"
    if recipe.on_error == "stop" and recipe.load == "lazy":
        yield (*path, "on_error"), "stop has no effect with `load: lazy`, which merges nothing at the start"


def _method(path: KeyPath, recipe: Recipe, registry: Registry) -> Iterator[Finding]:
    try:
        spec = registry.get(recipe.merge_method)
    except UserInputError as error:
        yield (*path, "merge_method"), str(error)
        return
    if recipe.space is not None and recipe.space not in spec.spaces:
        yield (
            (*path, "space"),
            f"{spec.name!r} is not defined in space {recipe.space!r}; allowed: {listed(spec.spaces)}",
        )
        return
    if spec.most_adapters is not None and len(recipe.adapters) > spec.most_adapters:
        found = f"are {len(recipe.adapters)}; {spec.name!r} takes {spec.most_adapters} at most"
        yield (*path, "adapters"), f"{found}: merge them in steps, by recipes of recipes, or take another method"
    yield from _parameters((*path, "parameters"), recipe.parameters, spec, recipe.space, per_adapter=False)
    for index, item in enumerate(recipe.adapters):
        here = (*path, "adapters", index, "parameters")
        yield from _parameters(here, item.parameters, spec, recipe.space, per_adapter=True)


def _parameters(
    path: KeyPath, values: Mapping[str, object], spec: MethodSpec, space: str | None, *, per_adapter: bool
) -> Iterator[Finding]:
    by_name = {parameter.name: parameter for parameter in spec.parameters}
    for name, value in values.items():
        if isinstance(value, list) and name in by_name and not varies(by_name[name]):
            yield (*path, name), "is a list; this parameter has one value for the whole merge, not one per module"
            continue
        for scalar in scalars(value):
            try:
                typed = spec.validate(space, {name: scalar}, per_adapter)[name]
            except UserInputError as error:
                yield (*path, name), str(error)
                break
            if isinstance(typed, bool | str) != isinstance(scalar, bool | str) or (
                isinstance(typed, bool | str) and type(typed) is not type(scalar)
            ):
                yield (*path, name), f"is {shown(scalar)}; write {shown(typed)}"
                break


def _cycles(recipes: Mapping[str, Recipe]) -> Iterator[Finding]:
    """Each circle of recipes once, at its first recipe in the file."""
    done: set[str] = set()
    for start in recipes:
        stack = [(start, iter(recipes[start].sources))] if start not in done else []
        trail = dict.fromkeys(name for name, _ in stack)
        while stack:
            name, items = stack[-1]
            for source in items:
                if source in trail:
                    names = list(trail)
                    circle = [*names[names.index(source) :], source]
                    yield ("recipes", source), f"recipes use each other in a circle: {' -> '.join(circle)}"
                elif source in recipes and source not in done:
                    stack.append((source, iter(recipes[source].sources)))
                    trail[source] = None
                    break
            else:
                done.add(name)
                del trail[name]
                stack.pop()
