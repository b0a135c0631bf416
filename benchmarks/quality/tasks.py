# SPDX-License-Identifier: Apache-2.0
"""The tasks: texts with a label each, and how a model is asked for it. All tasks are asked alike, so that nothing but the
text says which one it is."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SPARE = "spare"


@dataclass(frozen=True)
class Example:
    """A text and the index of its label."""

    text: str
    label: int


@dataclass(frozen=True)
class Task:
    """A task. chance: the share of the commonest label among the tests."""

    name: str
    labels: tuple[str, ...]
    train: Sequence[Example]
    valid: Sequence[Example]
    test: Sequence[Example]

    @property
    def chance(self) -> float:
        return max(Counter(example.label for example in self.test).values()) / len(self.test)


def prompt(text: str) -> str:
    """What the model reads before the label."""
    return f"{text}\nLabel:"


def answer(label: str) -> str:
    """What it is to write."""
    return f" {label}"


def read_tasks(folder: Path, test: int | None = None) -> list[Task]:
    """The tasks of a folder, in order of name; those in its folder `spare` come last."""
    places = sorted(path.parent for path in folder.glob("*/train.jsonl"))
    places += sorted(path.parent for path in folder.glob(f"{SPARE}/*/train.jsonl"))
    if not places:
        raise SystemExit(
            f"{folder}: has no task, a folder with train.jsonl, valid.jsonl and test.jsonl; give --data DIR"
        )
    return [_read_task(place, test) for place in places]


def _read_task(folder: Path, test: int | None) -> Task:
    splits = {}
    for split in ("train", "valid", "test"):
        lines = (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        splits[split] = [json.loads(line) for line in lines]
    labels = tuple(sorted({row["label"] for row in splits["train"]}))
    place = {label: index for index, label in enumerate(labels)}

    def examples(split: str) -> list[Example]:
        return [Example(row["text"], place[row["label"]]) for row in splits[split]]

    return Task(folder.name, labels, examples("train"), examples("valid"), examples("test")[:test])
