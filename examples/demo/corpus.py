# SPDX-License-Identifier: Apache-2.0
"""The text that the demo's base model is pre-trained on, made up as it goes: operations shown by example.

A document is a list of lines `label: source -> result`, all of one operation. The *known* operations carry their own
name, so the base learns to follow instruction words. The tasks of the adapters appear as well, but only under labels
drawn at random: the base learns to do them when shown how, and never learns what they are called. An unknown label
without any example most often means that the source is copied.
"""

import random
from collections.abc import Callable
from multiprocessing import get_context

import numpy as np
from numpy.typing import NDArray
from tasks import LETTERS, TASKS, VOWELS, draw_sum, draw_word, pseudo_word
from tokenizer import BOS, PAD, encode

Operation = Callable[[str], str]

DOCUMENT_TOKENS = 128
SHARDS = 64


def larger(numbers: str) -> str:
    """The larger one of "a+b"."""
    return max(numbers.split("+"), key=int)


def smaller(numbers: str) -> str:
    """The smaller one of "a+b"."""
    return min(numbers.split("+"), key=int)


def swapped(numbers: str) -> str:
    """The summands of "a+b" in the other order."""
    return "+".join(reversed(numbers.split("+")))


WORD_INSTRUCTIONS: dict[str, Operation] = {
    "copy": lambda word: word,
    "first": lambda word: word[0],
    "last": lambda word: word[-1],
    "tail": lambda word: word[1:],
    "chop": lambda word: word[:-1],
    "ends": lambda word: word[0] + word[-1],
    "length": lambda word: str(len(word)),
    "twice": lambda word: 2 * word,
    "title": str.title,
    "hyphen": "-".join,
    "past": lambda word: word + ("d" if word.endswith("e") else "ed"),
    "before": lambda word: "".join(LETTERS[LETTERS.index(letter) - 1] for letter in word),
    "rotate": lambda word: word[1:] + word[0],
    "rest": lambda word: "".join(letter for letter in word if letter not in VOWELS) or "-",
}
SUM_INSTRUCTIONS: dict[str, Operation] = {"larger": larger, "smaller": smaller, "swap": swapped}

SUM_SHARE = 0.2  # of the documents
KNOWN_SHARE = 0.3  # of the documents: a known operation under its own name
COPY_SHARE = {"word": 0.25, "sum": 0.6}  # of the others: copying, which becomes the base's guess at an unknown label
TASK_WEIGHTS = {"reverse": 3.0, "sort": 3.0, "next": 3.0, "add": 2.0}  # the harder ones are shown more often
OTHER_TASK_WEIGHT = 1.5
INSTRUCTION_WEIGHT = 0.5


def _unnamed(instructions: dict[str, Operation], over_sums: bool) -> tuple[list[Operation], list[float]]:
    """The operations, with their weights, that appear under random labels."""
    tasks = [task for task in TASKS.values() if (task.draw is draw_sum) == over_sums]
    operations = [task.answer for task in tasks] + list(instructions.values())
    weights = [TASK_WEIGHTS.get(task.name, OTHER_TASK_WEIGHT) for task in tasks]
    weights += [INSTRUCTION_WEIGHT] * len(instructions)
    return operations, weights


_UNNAMED = {"word": _unnamed(WORD_INSTRUCTIONS, False), "sum": _unnamed(SUM_INSTRUCTIONS, True)}


def random_label(rng: random.Random, exclude: str | None = None) -> str:
    """A label that says nothing about the operation: one of the tasks' names (never `exclude`) or a made-up word."""
    if rng.random() < 0.4:
        return rng.choice([name for name in TASKS if name != exclude])
    return pseudo_word(rng)


def document(rng: random.Random, exclude: str | None = None) -> str:
    """One document of a little over DOCUMENT_TOKENS characters; `exclude` names a task whose label must not occur."""
    kind = "sum" if rng.random() < SUM_SHARE else "word"
    instructions = SUM_INSTRUCTIONS if kind == "sum" else WORD_INSTRUCTIONS
    if rng.random() < KNOWN_SHARE:
        label, operation = rng.choice(list(instructions.items()))
    else:
        label = random_label(rng, exclude)
        if rng.random() < COPY_SHARE[kind]:
            operation = WORD_INSTRUCTIONS["copy"]
        else:
            operations, weights = _UNNAMED[kind]
            operation = rng.choices(operations, weights)[0]
    draw = draw_sum if kind == "sum" else draw_word
    text = ""
    while len(text) < DOCUMENT_TOKENS:
        source = draw(rng, "train")
        text += f"{label}: {source} ->{operation(source)}\n"
    return text


def document_rows(rng: random.Random, count: int, exclude: str | None = None) -> NDArray[np.uint8]:
    """`count` documents as token ids, (count, DOCUMENT_TOKENS): each starts with BOS and is cut off at the end."""
    rows = np.full((count, DOCUMENT_TOKENS), PAD, dtype=np.uint8)
    rows[:, 0] = BOS
    for row in rows:
        row[1:] = encode(document(rng, exclude))[: DOCUMENT_TOKENS - 1]
    return rows


def _shard(job: tuple[int, int, int]) -> NDArray[np.uint8]:
    seed, shard, count = job
    return document_rows(random.Random(f"corpus/{seed}/{shard}"), count)


def build_corpus(documents: int, seed: int, processes: int) -> NDArray[np.uint8]:
    """The corpus, (documents, DOCUMENT_TOKENS) token ids; the same bytes however many processes make it."""
    counts = [documents // SHARDS + (shard < documents % SHARDS) for shard in range(SHARDS)]
    jobs = [(seed, shard, count) for shard, count in enumerate(counts)]
    with get_context("spawn").Pool(processes) as pool:
        return np.concatenate(pool.map(_shard, jobs, chunksize=1))
