# SPDX-License-Identifier: Apache-2.0
"""The tasks: texts with a label each, and the words in which a model is asked for it, each task in its own."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

SPARE = "spare"


@dataclass(frozen=True)
class Words:
    """How a task is asked: an instruction before each text, none where it is empty, and a question after it."""

    instruction: str = ""
    question: str = "Label:"

    def prompt(self, text: str) -> str:
        """What the model reads before the label."""
        return "\n".join(part for part in (self.instruction, text, self.question) if part)


OWN_WORDS = {
    "agnews": Words("Which part of a newspaper has this story?", "Section:"),
    "banking": Words("What does this customer ask the bank about?", "Request:"),
    "cola": Words("Is this sentence good English?", "Grammar:"),
    "mathop": Words("How is this problem solved?", "Operation:"),
    "mrpc": Words("Do both sentences say the same?", "Meaning:"),
    "sick": Words("How are these two sentences related?", "Relation:"),
    "snips": Words("What does this user want the assistant to do?", "Service:"),
    "snli": Words("Does the second sentence follow from the first?", "Inference:"),
    "sst2": Words("Did this critic like the film?", "Sentiment:"),
    "subj": Words("Is this the view of a critic, or part of a story?", "Style:"),
    "trec": Words("What kind of answer does this question want?", "Kind:"),
}
"""Those of the data that this benchmark was made for; other tasks are asked in the neutral words."""


@dataclass(frozen=True)
class Example:
    """A text and the index of its label."""

    text: str
    label: int


@dataclass(frozen=True)
class Task:
    """A task. words: how it is asked in training and ever after; chance: the share of the commonest label among the tests."""

    name: str
    words: Words
    labels: tuple[str, ...]
    train: Sequence[Example]
    valid: Sequence[Example]
    test: Sequence[Example]

    @property
    def chance(self) -> float:
        return max(Counter(example.label for example in self.test).values()) / len(self.test)


def answer(label: str) -> str:
    """What it is to write."""
    return f" {label}"


def read_tasks(folder: Path, words: Mapping[str, Words], test: int | None = None) -> list[Task]:
    """The tasks of a folder, in order of name; those in its folder `spare` come last. words: by task; the neutral ones for
    others."""
    places = sorted(path.parent for path in folder.glob("*/train.jsonl"))
    places += sorted(path.parent for path in folder.glob(f"{SPARE}/*/train.jsonl"))
    if not places:
        raise SystemExit(
            f"{folder}: has no task, a folder with train.jsonl, valid.jsonl and test.jsonl; give --data DIR"
        )
    return [_read_task(place, words.get(place.name, Words()), test) for place in places]


def _read_task(folder: Path, words: Words, test: int | None) -> Task:
    splits = {}
    for split in ("train", "valid", "test"):
        lines = (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        splits[split] = [json.loads(line) for line in lines]
    labels = tuple(sorted({row["label"] for row in splits["train"]}))
    place = {label: index for index, label in enumerate(labels)}

    def examples(split: str) -> list[Example]:
        return [Example(row["text"], place[row["label"]]) for row in splits[split]]

    return Task(folder.name, words, labels, examples("train"), examples("valid"), examples("test")[:test])
