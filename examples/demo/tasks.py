# SPDX-License-Identifier: Apache-2.0
"""The demo's eight tasks: what a prompt looks like, what its answer is, and which sources are held out.

A *source* is what a task works on: a noun ("stone") or a sum ("12+47"). A source belongs to one split for good, by the
hash of its text alone, so nothing that is held out can be trained on under another task, or while pre-training.
"""

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Split = Literal["train", "validation", "heldout"]

HERE = Path(__file__).parent
WORDS = tuple((HERE / "words.txt").read_text(encoding="utf-8").split())
LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOWELS = "aeiou"
LARGEST_SUMMAND = 99


def split_of(source: str) -> Split:
    """The split of a source: 15 % held out, 15 % validation, the rest training, by SHA-256 of the text."""
    bucket = hashlib.sha256(source.encode()).digest()[0] * 100 // 256
    if bucket < 15:
        return "heldout"
    return "validation" if bucket < 30 else "train"


def plural(noun: str) -> str:
    """The plural of a regular noun: berries, boxes, churches, stones."""
    if noun.endswith("y") and noun[-2:-1] not in VOWELS:
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("s", "x", "z", "ch", "sh")) else "s")


def add(numbers: str) -> str:
    """The sum of "a+b"."""
    left, right = numbers.split("+")
    return str(int(left) + int(right))


def next_letters(word: str) -> str:
    """Every letter replaced by the one after it in the alphabet, z by a."""
    return "".join(LETTERS[(LETTERS.index(letter) + 1) % 26] for letter in word)


def pseudo_word(rng: random.Random) -> str:
    """Three to seven letters, half of the time pronounceable; so that what is learned is the rule, not the nouns."""
    length = rng.randint(3, 7)
    if rng.random() < 0.5:
        return "".join(rng.choices(LETTERS, k=length))
    start = rng.randrange(2)
    return "".join(rng.choice(VOWELS if (start + at) % 2 else "bcdfghjklmnpqrstvwxyz") for at in range(length))


def draw_noun(rng: random.Random, split: Split) -> str:
    """A noun of the list that belongs to `split`."""
    while True:
        noun = rng.choice(WORDS)
        if split_of(noun) == split:
            return noun


def draw_word(rng: random.Random, split: Split) -> str:
    """A noun; in the training split half of the time a pseudo-word of that split instead."""
    if split != "train" or rng.random() < 0.5:
        return draw_noun(rng, split)
    while True:
        word = pseudo_word(rng)
        if split_of(word) == split:
            return word


def draw_inflected(rng: random.Random, split: Split) -> str:
    """A word; half of the time one whose plural is more than an added s."""
    special = rng.random() < 0.5
    while True:
        word = draw_word(rng, split)
        if not special or plural(word) != word + "s":
            return word


def draw_vowelled(rng: random.Random, split: Split) -> str:
    """A word with at least one vowel, so that the answer is never empty."""
    while True:
        word = draw_word(rng, split)
        if any(letter in VOWELS for letter in word):
            return word


def draw_sum(rng: random.Random, split: Split) -> str:
    """Two numbers to add, "a+b", each from 1 to LARGEST_SUMMAND."""
    while True:
        numbers = f"{rng.randint(1, LARGEST_SUMMAND)}+{rng.randint(1, LARGEST_SUMMAND)}"
        if split_of(numbers) == split:
            return numbers


@dataclass(frozen=True)
class Task:
    """One task: its name, which is also its instruction word and its adapter's name, and how to make examples of it."""

    name: str
    answer: Callable[[str], str]
    draw: Callable[[random.Random, Split], str]

    def prompt(self, source: str) -> str:
        """What a user sends: "reverse: stone ->"."""
        return f"{self.name}: {source} ->"


@dataclass(frozen=True)
class Example:
    """One prompt with the one answer that counts as right."""

    task: str
    prompt: str
    answer: str


TASKS = {
    task.name: task
    for task in (
        Task("reverse", lambda word: word[::-1], draw_word),
        Task("upper", str.upper, draw_word),
        Task("sort", lambda word: "".join(sorted(word)), draw_word),
        Task("add", add, draw_sum),
        Task("plural", plural, draw_inflected),
        Task("double", lambda word: "".join(2 * letter for letter in word), draw_word),
        Task("vowels", lambda word: "".join(letter for letter in word if letter in VOWELS), draw_vowelled),
        Task("next", next_letters, draw_word),
    )
}


def examples(task: Task, split: Split, count: int, seed: int) -> list[Example]:
    """`count` different examples of one split, the same for the same seed."""
    rng = random.Random(f"{task.name}/{split}/{seed}")
    sources: dict[str, None] = {}
    while len(sources) < count:
        sources[task.draw(rng, split)] = None
    return [Example(task.name, task.prompt(source), task.answer(source)) for source in sources]
