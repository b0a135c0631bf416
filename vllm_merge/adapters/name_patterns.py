# SPDX-License-Identifier: Apache-2.0
"""PEFT's patterns of module names, matched in linear time.

A key of rank_pattern or alpha_pattern is a regular expression for the end of a module's name, from a dot or from the
beginning. Python's matcher may take exponential time over one, and an adapter may come from anywhere, so that only what
needs no backtracking is accepted: characters, `.`, classes, groups, alternatives, `*`, `+`, `?`, `{m,n}`, `^` and `$`.
Such an expression is a finite automaton (Thompson, CACM 11(6), 1968), which takes each character of a name once.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

MAX_LENGTH = 512  # characters of a pattern
MAX_REPEATS = 64  # the highest count in braces
MAX_STATES = 2000

# Without an operator there is nothing to backtrack over: such a key is compared, which takes no expression at all.
_PLAIN = re.compile(r"\^?(?:[\w./-]|\\[.\-_/])+\$?")
_CLASS = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]")
# Escapes, so that they are passed over, and classes, closed or not.
_CLASSES = re.compile(r"\\.|\[(\^?\]?(?:\\.|[^\]\\])*)(?:\]|$)", re.DOTALL)
_SET_OPERATION = re.compile(r"(?<!\\)(?:\[|--|&&|\|\||~~)")  # which later versions of Python may read otherwise
_BRACES = re.compile(r"\{(\d{1,4})(,?)(\d{0,4})\}")

Matcher: TypeAlias = Callable[[str], bool]


class PatternError(ValueError):
    """A pattern is not a regular expression, or not one of those that are matched. The text says what is wrong."""


def compile_pattern(key: str) -> Matcher:
    """Whether a name matches `key` by PEFT's rule. Raises PatternError."""
    if len(key) > MAX_LENGTH:
        raise PatternError(f"has {len(key)} characters; at most {MAX_LENGTH} are allowed")
    if _PLAIN.fullmatch(key):
        return _plain(key)
    if any(_SET_OPERATION.search(found[1]) for found in _CLASSES.finditer(key) if found[1]):
        raise PatternError("has a class with one of '[', '--', '&&', '||', '~~' in it; put a backslash before it")
    try:
        re.compile(rf"(.*\.)?({key})$")
    except (re.error, OverflowError, RecursionError) as error:
        raise PatternError(f"is not a regular expression ({getattr(error, 'msg', error)})") from None
    try:
        return _Automaton(key).matches
    except RecursionError:
        raise PatternError("is nested too deeply") from None


def _plain(key: str) -> Matcher:
    """A key of characters, of which a dot stands for any; a large adapter has thousands of these."""
    whole, pieces, size = key.startswith("^"), [], 0
    for piece in re.split(r"(?<!\\)\.", key.removeprefix("^").removesuffix("$")):
        letters = piece.replace("\\", "")
        pieces.append((size, letters))
        size += len(letters) + 1
    size -= 1

    def matches(name: str) -> bool:
        start = len(name) - size
        if start < 0 or (start and (whole or name[start - 1] != ".")):
            return False
        return all(name.startswith(letters, start + at) for at, letters in pieces)

    return matches


@dataclass(slots=True)
class _State:
    """Where an automaton can be. test: of the character that leads to `follow` (None: no character is needed).

    anchor: "^" or "$" where the state can only be at the beginning or the end of the name.
    """

    test: Matcher | None = None
    follow: list[int] = field(default_factory=list)
    anchor: str = ""


class _Automaton:
    """The states of one pattern. Sets of states that were met are kept with what each character makes of them."""

    def __init__(self, key: str) -> None:
        self._text, self._position = key, 0
        self._states: list[_State] = []
        self._entry, self._exit = self._alternatives()
        if self._position < len(key):
            raise PatternError("has a ')' too many")
        self._steps: dict[tuple[frozenset[int], str], frozenset[int]] = {}

    def matches(self, name: str) -> bool:
        """Whether the pattern matches `name` from its beginning or from after one of its dots, to its end."""
        current = self._closure({self._entry}, at_start=True, at_end=not name)
        for index, character in enumerate(name):
            last = index == len(name) - 1
            key = (current, f"{character}{last:d}")
            if key not in self._steps:
                reached = {
                    follow
                    for state in current
                    if (test := self._states[state].test) is not None and test(character)
                    for follow in self._states[state].follow
                }
                if character == ".":
                    reached.add(self._entry)
                self._steps[key] = self._closure(reached, at_start=False, at_end=last)
            current = self._steps[key]
        return self._exit in current

    def _closure(self, states: set[int], *, at_start: bool, at_end: bool) -> frozenset[int]:
        """The states that are reached without a character."""
        waiting, found = list(states), set[int]()
        while waiting:
            number = waiting.pop()
            state = self._states[number]
            if number in found or (state.anchor == "^" and not at_start) or (state.anchor == "$" and not at_end):
                continue
            found.add(number)
            if state.test is None:
                waiting.extend(state.follow)
        return frozenset(found)

    # -- reading the expression: each method returns the first and the last state of a piece ---------------------------

    def _new(self, test: Matcher | None = None, anchor: str = "") -> int:
        if len(self._states) >= MAX_STATES:
            raise PatternError(f"needs more than {MAX_STATES} states; write it shorter")
        self._states.append(_State(test, anchor=anchor))
        return len(self._states) - 1

    def _link(self, before: int, after: int) -> None:
        self._states[before].follow.append(after)

    def _peek(self) -> str:
        return self._text[self._position : self._position + 1]

    def _take(self, expected: str) -> bool:
        found = self._text.startswith(expected, self._position)
        self._position += len(expected) * found
        return found

    def _alternatives(self) -> tuple[int, int]:
        first, last = self._new(), self._new()
        while True:
            begin, end = self._sequence()
            self._link(first, begin)
            self._link(end, last)
            if not self._take("|"):
                return first, last

    def _sequence(self) -> tuple[int, int]:
        first = last = self._new()
        while self._peek() not in ("", "|", ")"):
            begin, end = self._repeated()
            self._link(last, begin)
            last = end
        return first, last

    def _repeated(self) -> tuple[int, int]:
        start = self._position
        piece = self._atom()
        stop = self._position
        if (braces := _BRACES.match(self._text, self._position)) is not None:
            self._position = braces.end()
            least = int(braces[1])
            most = least if not braces[2] else int(braces[3]) if braces[3] else None
        elif self._peek() and self._peek() in "*+?":
            operator = self._text[self._position]
            self._position += 1
            least, most = int(operator == "+"), 1 if operator == "?" else None
        else:
            return piece
        if max(least, most or 0) > MAX_REPEATS:
            raise PatternError(f"repeats something more than {MAX_REPEATS} times; write it shorter")
        self._take("?")  # a lazy operator matches the same names
        if self._peek() == "+":
            raise PatternError("has a possessive operator, which is not supported; leave out its '+'")
        after = self._position
        pieces = [piece]
        for _ in range(max(least, most or 1) - 1):
            self._position = start
            pieces.append(self._atom())
            assert self._position == stop
        self._position = after
        return self._chained(pieces, least, unbounded=most is None, none=most == 0)

    def _chained(self, pieces: list[tuple[int, int]], least: int, *, unbounded: bool, none: bool) -> tuple[int, int]:
        first, last = self._new(), self._new()
        before = first
        for index, (begin, end) in enumerate(pieces):
            if index >= least:
                self._link(before, last)
            if none:
                break
            self._link(before, begin)
            before = end
            if unbounded and index == len(pieces) - 1:
                self._link(end, begin)
        else:
            self._link(before, last)
        return first, last

    def _atom(self) -> tuple[int, int]:
        if self._take("("):
            if self._peek() == "?" and not self._text.startswith("?:", self._position):
                raise PatternError("has a group (?…), which is not supported; only (…) and (?:…) are")
            self._take("?:")
            piece = self._alternatives()
            self._take(")")
            return piece
        for anchor in "^$":
            if self._take(anchor):
                state = self._new(anchor=anchor)
                return state, state
        return self._character()

    def _character(self) -> tuple[int, int]:
        if self._take("\\"):
            letter = self._peek()
            self._position += 1
            if letter.isalnum() and letter not in "dwsDWS":
                raise PatternError(f"has \\{letter}, which is not supported; \\d, \\w, \\s and escaped signs are")
            source = "\\" + letter
        elif (found := _CLASS.match(self._text, self._position)) is not None:
            self._position = found.end()
            source = found[0]
        else:
            source = self._peek()
            self._position += 1
            source = source if source == "." else re.escape(source)
        single = re.compile(source)
        begin, end = self._new(lambda character: single.fullmatch(character) is not None), self._new()
        self._link(begin, end)
        return begin, end
