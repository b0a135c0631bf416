# SPDX-License-Identifier: Apache-2.0
"""Recipes that come with a request: what they may say, and their short form as a model name.

    merge:METHOD(ADAPTER[=WEIGHT],…[;KEY=VALUE,…])          merge:ties(sql=0.6,code=0.4;density=0.2,rank=16)

KEY is `rank`, `energy`, `space`, `seed`, `on_miss`, or a parameter of the recipe; VALUE is a number, true, false or a word.
There are no spaces. Everything else than this needs the long form, a recipe as JSON.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from vllm_merge.errors import UserInputError
from vllm_merge.recipe.checks import check_recipe
from vllm_merge.recipe.file import RecipeFile
from vllm_merge.recipe.hints import message
from vllm_merge.recipe.problems import Finding, KeyPath, cut, dotted, suggested
from vllm_merge.recipe.protocols import CheckPrecondition, Registry
from vllm_merge.recipe.schema import Recipe, RecipeDocument
from vllm_merge.recipe.values import NAME, NAME_RULE, shown

PREFIX = "merge:"
MAX_NAME = 2000  # characters
MAX_VALUES = 2000  # of a recipe: keys, items and scalars
MAX_TEXT = 1 << 16  # characters of all its keys and texts
MAX_DEPTH = 8

STAGE = "adhoc()"  # what the merge is called inside its plan: no name of a file can be this

_REFUSED = {
    "load": "it is merged when it is asked for",
    "on_error": "it has no start that could fail",
    "safety": "a score is measured of a recipe of the server's file",
    "continue": "only recipes of the server's file go on from earlier results",
}
ALLOWED = tuple(name for f, i in Recipe.model_fields.items() if (name := i.alias or f) not in _REFUSED)

_NUMBER = re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_METHOD = re.compile(r"[A-Za-z0-9_.-]+")
_KEYS = {"space", "seed", "on_miss", "rank"}  # of the recipe itself; all others are parameters
_FORM = "the form is merge:METHOD(ADAPTER=WEIGHT,…;KEY=VALUE,…)"


class AdHocError(UserInputError):
    """A recipe of a request is wrong. param: the field of the request that is, as OpenAI's errors name it."""

    def __init__(self, param: str, problem: str) -> None:
        super().__init__(problem)
        self.param = param


@dataclass(frozen=True)
class Written:
    """A recipe of a request. columns: 1-based, of the keys of one that was written as a model name; None for JSON."""

    recipe: Any
    columns: Mapping[KeyPath, int] | None = None

    def error(self, path: KeyPath, problem: str) -> AdHocError:
        """The error that `problem` is at the key `path` of the recipe."""
        problem = cut(problem, 500)
        if self.columns is None:
            param = cut(dotted(("merge", *path)), 200)
            return AdHocError(param, f"{param}: {problem}")
        known = next((path[:n] for n in range(len(path), 0, -1) if path[:n] in self.columns), ())
        column = self.columns.get(known, 1)
        return AdHocError("model", f"column {column}: {dotted(path) or 'the merge'}: {problem}")


@dataclass(frozen=True)
class Limits:
    """rank: the highest of a result. adapters: inputs of one merge."""

    rank: int
    adapters: int


def parse_name(name: str) -> Written:
    """The recipe that a model name stands for, which begins with PREFIX. Raises AdHocError, naming the column."""
    if len(name) > MAX_NAME:
        raise AdHocError(
            "model", f"the name has {len(name):,} characters; at most {MAX_NAME:,}. Send the recipe as JSON."
        )
    return _Parser(name).parse()


class _Parser:
    def __init__(self, text: str) -> None:
        self._text, self._at = text, len(PREFIX)
        self._columns: dict[KeyPath, int] = {}

    def parse(self) -> Written:
        recipe: dict[str, Any] = {"adapters": [], "parameters": {}}
        self._mark(("merge_method",))
        recipe["merge_method"] = self._take(_METHOD, "the name of a merge method")
        self._expect("(")
        end = ","
        while end == ",":
            end = self._adapter(recipe["adapters"])
        end = "," if end == ";" else end
        while end == ",":
            end = self._setting(recipe)
        if self._at < len(self._text):
            raise self._error("nothing may follow the closing parenthesis")
        return Written(recipe, self._columns)

    def _adapter(self, adapters: list[dict[str, Any]]) -> str:
        path: KeyPath = ("adapters", len(adapters))
        self._mark(path)
        name = self._take(NAME, f"an adapter's name ({NAME_RULE})")
        item: dict[str, Any] = {"adapter": name}
        adapters.append(item)
        end = self._expect("=,;)")
        if end == "=":
            self._mark((*path, "parameters"))
            item["parameters"] = {"weight": self._number()}
            end = self._expect(",;)")
        return end

    def _setting(self, recipe: dict[str, Any]) -> str:
        start = self._at
        key = self._take(_WORD, "a key")
        self._expect("=")
        place = ("rank",) if key == "energy" else (key,) if key in _KEYS else ("parameters", key)
        if place in self._columns:
            self._at = start
            raise self._error(f"{key} is given already, in column {self._columns[place]}")
        self._columns[place] = start + 1
        if key == "energy":
            recipe["rank"] = {"energy": self._number()}
        elif key in _KEYS:
            recipe[key] = self._value()
        else:
            recipe["parameters"][key] = self._value()
        return self._expect(",)")

    def _value(self) -> int | float | bool | str:
        if _WORD.match(self._text, self._at):
            word = self._take(_WORD, "a value")
            return {"true": True, "false": False}.get(word, word)
        return self._number("a number, true, false or a word")

    def _number(self, wanted: str = "a number") -> int | float:
        start = self._at
        text = self._take(_NUMBER, wanted)
        value = float(text) if len(text) > 18 or not text.lstrip("+-").isdecimal() else int(text)
        if not math.isfinite(value):
            self._at = start
            raise self._error(f"{text} is too large")
        return value

    def _take(self, pattern: re.Pattern[str], wanted: str) -> str:
        found = pattern.match(self._text, self._at)
        if found is None:
            raise self._error(f"expected {wanted}")
        self._at = found.end()
        return found[0]

    def _expect(self, characters: str) -> str:
        found = self._text[self._at : self._at + 1]
        if not found or found not in characters:
            raise self._error("expected " + " or ".join(repr(character) for character in characters))
        self._at += 1
        return found

    def _mark(self, path: KeyPath) -> None:
        self._columns[path] = self._at + 1

    def _error(self, problem: str) -> AdHocError:
        rest = self._text[self._at :]
        found = f"found {cut(rest, 24)!r}" if rest else "the name ends"
        return AdHocError("model", f"column {self._at + 1}: {problem}; {found}. In a model name, {_FORM}.")


def check_size(written: Written, limits: Limits) -> None:
    """Raise AdHocError where a recipe is none, or is too large to be looked at."""
    given = written.recipe
    if not isinstance(given, dict):
        raise written.error((), f"is {shown(given)}; expected a recipe: an object with merge_method and adapters")
    items = given.get("adapters")
    if isinstance(items, list) and len(items) > limits.adapters:
        raise written.error(("adapters",), f"are {len(items)}; a merge of a request takes {limits.adapters} at most")
    if (size := _size(given)) is not None:
        raise written.error((), size)


def check_written(
    written: Written, file: RecipeFile, registry: Registry, check_precondition: CheckPrecondition, limits: Limits
) -> Recipe:
    """The recipe of a request if it may be merged with the adapters and recipes of `file`. Raises AdHocError."""
    check_size(written, limits)
    given = written.recipe
    for key in given:
        if key in _REFUSED:
            raise written.error((key,), f"has no place in a merge of a request: {_REFUSED[key]}; leave it out")
        if key not in ALLOWED:
            raise written.error((str(key),), f"unknown key{suggested(str(key), ALLOWED, 'allowed')}")
    try:
        recipe = Recipe.model_validate(given)
    except ValidationError as error:
        details = error.errors(include_url=False, include_context=True)[0]
        path, text = message({**details, "loc": ("recipes", STAGE, *details["loc"])})
        raise written.error(path[2:], text) from None
    for path, text in _findings(recipe, file, registry, check_precondition, limits):
        raise written.error(path, text)
    return recipe


def _findings(
    recipe: Recipe, file: RecipeFile, registry: Registry, check_precondition: CheckPrecondition, limits: Limits
) -> Iterator[Finding]:
    document = RecipeDocument.model_construct(
        adapters=dict(file.adapters), recipes={**file.recipes, STAGE: recipe}, aliases=dict(file.aliases)
    )
    known = dict.fromkeys([*file.adapters, *file.recipes])
    for path, text in check_recipe(document, STAGE, registry, known, check_precondition):
        yield path[2:], text
    if recipe.rank == "lossless":
        yield ("rank",), f"lossless has no bound; allowed are auto, {{energy: SHARE}} and 1 to {limits.rank}"
    if isinstance(recipe.rank, int) and recipe.rank > limits.rank:
        yield ("rank",), f"is {recipe.rank}; at most {limits.rank} here"


def _size(value: Any) -> str | None:
    """Why a recipe is too large; None if it is not."""
    count, characters, level = 0, 0, [value]
    for _ in range(MAX_DEPTH):
        count += len(level)
        if count > MAX_VALUES:
            return f"has more than {MAX_VALUES:,} values"
        texts = [
            text for item in level for text in (item if isinstance(item, dict) else [item]) if isinstance(text, str)
        ]
        characters += sum(map(len, texts))
        if characters > MAX_TEXT:
            return f"has more than {MAX_TEXT:,} characters of text"
        try:
            "".join(texts).encode()
        except UnicodeEncodeError:
            return "has half of a surrogate pair, which is no character"
        level = [
            inner
            for item in level
            if isinstance(item, dict | list)
            for inner in (item.values() if isinstance(item, dict) else item)
        ]
    return f"is nested deeper than {MAX_DEPTH} levels" if level else None
