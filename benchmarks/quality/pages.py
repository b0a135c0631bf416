# SPDX-License-Identifier: Apache-2.0
"""The generated parts of pages: between two markers, everything else is left as it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.quality.grid import LOSSLESS
from benchmarks.quality.learning import METHODS, Learned, beside_best, sign_of

BEGIN, END = "<!-- generated: make evidence -->", "<!-- end of generated -->"
MEANING = "score and gain in %, with 95 % intervals; gain over the best recipe of the same rank on validation that learns nothing, on the same seeds."
TUNING = {  # page of docs/tuning: the methods it is about
    "adamerging": ("adamerging", "adamerging++"),
    "enmp": ("enmp",),
    "lorahub": ("lorahub",),
    "nsc": ("nsc",),
    "regmean": ("regmean",),
    "ssr": ("ssr",),
    "index": METHODS,
}


def renewed(page: str, block: str) -> str:
    """The page with another block between its markers."""
    start, _, rest = page.partition(BEGIN)
    return f"{start}{BEGIN}\n\n{block}\n\n{END}{rest.partition(END)[2]}"


def write_tuning(folder: Path, learned: Sequence[Learned], tasks: int, others: Sequence[Learned], page: str) -> None:
    """What each method gained, into its page and into the index. others: of the other set of results, shown where this one has
    nothing of a method; page: where that set is, from the folder."""
    for name, methods in TUNING.items():
        path = folder / f"{name}.md"
        mine, theirs = (
            [one for method in methods for one in runs if one.method == method] for runs in (learned, others)
        )
        there = {one.method for one in mine}
        elsewhere = [one for one in theirs if one.method not in there]
        missing = [method for method in methods if method not in there | {one.method for one in elsewhere}]
        parts = []
        if mine:
            parts.append("\n".join([f"{tasks} tasks; {MEANING}\n", *_table(mine)]))
        if elsewhere:
            asked = f"Measured only with adapters that were all asked in [the same words]({page}#merges-that-learn-{tasks}-tasks); {MEANING}\n"
            parts.append("\n".join([asked, *_table(elsewhere)]))
        if missing:
            parts.append(f"Not measured yet: {', '.join(missing)}.")
        path.write_text(renewed(path.read_text(encoding="utf-8"), "\n\n".join(parts)), encoding="utf-8")


def _table(learned: Sequence[Learned]) -> Iterator[str]:
    yield "| method | rank | labels | score | gain | beats | over | seeds | seconds on the GPU |\n|---|---|---|---|---|---|---|---|---|"
    for one in sorted(learned, key=lambda one: (one.rank != LOSSLESS, -one.score.value)):
        gain, over = (one.gain.in_words(sign=True), one.over) if one.gain else ("", "")
        yield (
            f"| {one.method} | {one.rank} | {'used' if one.labels else 'for λ'} | {one.score.in_words()} | {gain} | "
            f"{sign_of(one)} | {over} | {one.seeds} | {one.seconds:.0f} |"
        )
    yield from (f"\n{sentence}" for sentence in beside_best(learned))
    jobs = max(one.jobs for one in learned)
    if jobs > 1:
        yield f"\nUp to {jobs} learners shared the GPU, so alone they are quicker."
