# SPDX-License-Identifier: Apache-2.0
"""The quality benchmark in miniature: made-up tasks and a model of two layers, run once for all tests."""

from __future__ import annotations

import json
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.quality import records, run
from benchmarks.quality.prepare import Bench
from benchmarks.quality.settings import Base, Learning, Member, Settings, Tuning
from benchmarks.quality.tasks import Words

FILLERS = [
    "the",
    "a",
    "of",
    "and",
    "with",
    "near",
    "under",
    "over",
    "old",
    "new",
    "quiet",
    "long",
    "small",
    "large",
    "round",
    "some",
]
WORDS = {
    "kinds": {"plant": "oak fern moss lily", "animal": "dog cat hen fox"},
    "moves": {"motion": "run jump swim climb", "rest": "sit sleep lie wait"},
    "places": {"town": "street shop tower square", "nature": "river hill forest lake"},
}
METHODS = ("task_arithmetic", "ties", "ctm")
STAGES = ("all tasks", "osrm", "pairs")
SETTINGS = Settings(
    name="miniature",
    base=Base(
        layers=2,
        width=64,
        heads=2,
        hidden=96,
        vocabulary=320,
        context=56,
        epochs=20,
        batch=32,
        learning_rate=6e-3,
        dropout=0.0,
        checks=2,
    ),
    tuning=Tuning(
        rank=4,
        alpha=16,
        steps=100,
        batch=16,
        learning_rate=1e-2,
        bank=4,
        samples=8,
        mixed=(Member(2, 8, 1.0), Member(8, 4, 0.5)),
    ),
    learning=Learning(gradients=4, generations=1, prompts=4, rate=0.05, answer_tokens=6),
    words={"noise": Words("a", "odd:")},
    seeds=(0,),
    tasks=3,
    sizes=(2, 3),
    ranks=(4,),
    validation=12,
    test=60,
    tokens_at_once=4096,
)


def sentence(rng: random.Random, words: list[str]) -> str:
    """Fillers with one of the words among them."""
    chosen = rng.choices(FILLERS, k=5)
    chosen.insert(rng.randrange(6), rng.choice(words))
    return " ".join(chosen)


def make_data(folder: Path) -> None:
    """Tasks that a word decides, one that nothing decides, and a corpus."""
    rng = random.Random(0)
    for task, labels in {**WORDS, "spare/noise": {"odd": "stone", "even": "stone"}}.items():
        (folder / task).mkdir(parents=True)
        for split, count in (("train", 160), ("valid", 20), ("test", 60)):
            picked = [rng.choice(list(labels)) for _ in range(count)]
            rows = [{"text": sentence(rng, labels[label].split()), "label": label} for label in picked]
            (folder / task / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    topics = [words.split() for labels in WORDS.values() for words in labels.values()]
    others = [label for labels in WORDS.values() for label in labels] + ["Label:", "odd", "even", "stone"]
    documents = ["\n".join(sentence(rng, topic) for _ in range(6)) for topic in rng.choices([*topics, others], k=250)]
    (folder / "corpus.txt").write_text("\n\n".join(documents), encoding="utf-8")


@dataclass(frozen=True)
class Done:
    """A run of the miniature, and what it had recorded."""

    places: run.Places
    bench: Bench
    rows: list[records.Row]

    def merges(self, **fields: Any) -> list[records.Row]:
        merges = [row for row in self.rows if row["kind"] == "merge"]
        return [row for row in merges if all(row[name] == value for name, value in fields.items())]


def made(folder: Path) -> Done:
    """The miniature, run in a folder."""
    make_data(folder / "data")
    places = run.Places(SETTINGS, folder / "data", folder / "weights", folder / "results", "cpu")
    assert run.run(places, until=time.monotonic() + 600, methods=METHODS, stages=STAGES) == 0
    return Done(places, places.open(), records.read_rows(places.results))
