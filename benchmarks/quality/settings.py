# SPDX-License-Identifier: Apache-2.0
"""What is trained and measured, and how long: all that decides the numbers, in one place, recorded beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from benchmarks.quality.tasks import OWN_WORDS, Words

ADAPTER_SETS = ("plain", "osrm", "osrm-mean", "mixed")


@dataclass(frozen=True)
class Base:
    """The base model, a Llama with tied embeddings, and its training on the corpus.

    epochs: over the corpus; few, and with dropout, because 13 million tokens are soon learnt by heart. The weights with the
    least loss on held-out text are kept.
    """

    layers: int = 8
    width: int = 512
    heads: int = 8
    hidden: int = 1408
    vocabulary: int = 8192
    context: int = 512
    epochs: float = 5.0
    batch: int = 64
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.1
    dropout: float = 0.1
    checks: int = 20
    max_characters: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Member:
    """An adapter of the mixed set. speed: its learning rate, times that of the others."""

    rank: int
    alpha: float
    speed: float


MIXED = (  # all learn, and the longest ΔW is about seven times the shortest
    Member(4, 4, 0.5),
    Member(16, 16, 0.25),
    Member(8, 4, 0.5),
    Member(64, 64, 0.5),
    Member(16, 16, 1.0),
    Member(16, 8, 0.25),
    Member(64, 64, 0.5),
    Member(4, 8, 0.5),
)


@dataclass(frozen=True)
class Tuning:
    """The adapters: all seven projections of every layer. bank: how many are trained side by side on a GPU; mixed: the members
    of the mixed set, which the tasks take in turn."""

    rank: int = 16
    alpha: float = 16.0
    steps: int = 500
    batch: int = 32
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    warmup: float = 0.06
    bank: int = 24
    samples: int = 100
    mixed: tuple[Member, ...] = MIXED


@dataclass(frozen=True)
class Learning:
    """What the methods of `vllm-merge tune` are given. gradients, generations: steps of those that take gradients, and of
    those that search; prompts: of each task in a step."""

    gradients: int = 200
    generations: int = 15
    prompts: int = 8
    rate: float = 0.01
    answer_tokens: int = 16


@dataclass(frozen=True)
class Settings:
    """All of a run. words: how each task is asked; validation: examples of each task that λ and density are chosen on; test:
    None for all there are; joint: tests of each task that are also asked with the labels of all tasks.

    500 tests of each task halve the time of measuring; a score of eight tasks has a standard deviation of about 1.5 points by
    them, and the intervals show it.
    """

    name: str = "full"
    base: Base = field(default_factory=Base)
    tuning: Tuning = field(default_factory=Tuning)
    learning: Learning = field(default_factory=Learning)
    words: Mapping[str, Words] = field(default_factory=lambda: dict(OWN_WORDS))
    seeds: tuple[int, ...] = (0, 1, 2)
    tasks: int = 8
    sizes: tuple[int, ...] = (2, 4, 8)
    ranks: tuple[int, ...] = (16,)
    validation: int = 64
    test: int | None = 500
    joint: int = 100
    gate: float = 0.20
    tokens_at_once: int = 16384


# The same on a CPU, to try the code on real data; its numbers mean nothing.
SMALL = Settings(
    name="small",
    base=Base(
        layers=3,
        width=128,
        heads=4,
        hidden=344,
        vocabulary=4096,
        context=128,
        epochs=1,
        batch=16,
        learning_rate=6e-3,
        max_characters=2_500_000,
    ),
    tuning=Tuning(rank=8, alpha=8, steps=150, batch=16, bank=2, samples=20),
    learning=Learning(gradients=20, generations=2),
    seeds=(0,),
    tasks=4,
    sizes=(2, 4),
    ranks=(8,),
    validation=24,
    test=100,
    joint=50,
    gate=0.05,
    tokens_at_once=8192,
)
PRESETS = {"full": Settings(), "same-words": Settings(name="same-words", words={}), "small": SMALL}
