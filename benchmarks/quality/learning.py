# SPDX-License-Identifier: Apache-2.0
"""Merges that learned, beside those that did not: a table, and the goals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.quality.claims import FAILED, HELD, UNDECIDED, UNMEASURED, Claim
from benchmarks.quality.grid import LOSSLESS
from benchmarks.quality.records import Row
from benchmarks.quality.scores import Family, Interval, Scores

# The quick ones first. MergeAlign is no method of its own but a safety set beside the data; these tasks have none.
METHODS = ("ssr", "regmean", "adamerging", "adamerging++", "nsc", "lorahub", "enmp")
GOAL = 0.85
SPACE = "learned"  # of the families of learned merges


def with_learned(rows: Sequence[Row], tasks: Sequence[str], gate: float) -> Scores:
    """The scores of all merges, learned ones among them as families whose space is SPACE."""
    as_merges = [
        {**row, "kind": "merge", "space": SPACE, "stage": SPACE, "merge_seconds": row["seconds"]}
        for row in rows
        if row["kind"] == "learned"
    ]
    return Scores([*(row for row in rows if row["kind"] != "learned"), *as_merges], tasks, gate)


@dataclass(frozen=True)
class Learned:
    """What a method that learns reached at a rank. gain: over the best on validation that learns nothing, named by `over`, on the
    same seeds; beside: over the best on the tests, named by `rival`, where that is another one; jobs: how many shared the device."""

    method: str
    rank: str
    labels: bool
    score: Interval
    gain: Interval | None
    over: str
    seeds: int
    seconds: float
    jobs: int
    beside: Interval | None = None
    rival: str = ""


def learned_runs(scores: Scores, rows: Sequence[Row]) -> list[Learned]:
    """Of scores with learned merges, the best first."""
    found = []
    for family in sorted((f for f in scores.families if f.space == SPACE), key=lambda f: -scores.score(f).value):
        chosen, rival = (best_without_data(scores, family.rank, on_tests) for on_tests in (False, True))
        other = rival if rival != chosen else None
        runs = [row for row in rows if row["kind"] == "learned" and row["method"] == family.method]
        found.append(
            Learned(
                family.method,
                family.rank,
                any(row["labels"] for row in runs),
                scores.score(family),
                scores.difference(family, chosen) if chosen else None,
                _name(chosen),
                len(scores.families[family]),
                scores.seconds(family),
                max(row.get("jobs", 1) for row in runs),
                scores.difference(family, other) if other else None,
                _name(other),
            )
        )
    return found


def _name(family: Family | None) -> str:
    return f"{family.method} in {family.space}" if family else ""


def beside_best(learned: Sequence[Learned]) -> Iterator[str]:
    """A sentence for each rank at which what is best on the tests is another merge than the best on validation."""
    for rank in dict.fromkeys(one.rank for one in learned):
        mine = [one for one in learned if one.rank == rank and one.beside is not None]
        if mine:
            gains = ", ".join(f"{one.method} {one.beside.in_words(sign=True)}" for one in mine if one.beside)
            yield f"On the tests {mine[0].rival} is the better one, {_at(rank)}. Over it: {gains}."


def sign_of(one: Learned) -> str:
    """Whether it beats what learns nothing, where the interval says so."""
    if one.gain is None:
        return ""
    return "yes" if one.gain.low > 0 else "no" if one.gain.high < 0 else "undecided"


def learned_goals(scores: Scores, learned: Sequence[Learned], rank: int | str) -> list[Claim]:
    """The best on validation reaches GOAL; each beats the best without data."""
    best = scores.best(set="plain", size=len(scores.tasks), space=SPACE, rank=LOSSLESS)
    text = f"{len(scores.tasks)} tasks: the best learned merge reaches {100 * GOAL:.0f} % lossless"
    if best is None:
        return [Claim(text, "goal", UNMEASURED, "")]
    score = scores.score(best)
    found = [Claim(text, "goal", HELD if score.value >= GOAL else FAILED, f"{score.in_words()}, {best.method}")]
    for at in (LOSSLESS, str(rank)):
        mine = [one for one in learned if one.rank == at and one.gain is not None]
        if not mine:
            continue
        answers = [sign_of(one) for one in mine]
        text = f"each learned merge beats the best without data, {_at(at)}"
        verdict = HELD if set(answers) == {"yes"} else FAILED if "no" in answers else UNDECIDED
        facts = f"{answers.count('yes')} of {len(mine)} above {mine[0].over}, {answers.count('no')} below"
        found.append(Claim(text, "goal", verdict, facts))
    return found


def learned_table(learned: Sequence[Learned]) -> Iterator[str]:
    """Score, seconds and gain of each learned merge, the best first."""
    if not learned:
        return
    yield "By `vllm-merge tune` from the plain adapters and the validation examples, from task arithmetic (AdaMerging++ from KnOTS-TIES). Gain:"
    yield "over the best merge of the same rank on validation that learns nothing, on the same seeds. Score and gain in %, with 95 % intervals."
    jobs = max(one.jobs for one in learned)
    yield f"Seconds are those of learning, on a device that up to {jobs} learners shared. Labels: for λ alone, or to learn by.\n"
    yield "| method | rank | labels | score | gain | over | seeds | seconds |\n|---|---|---|---|---|---|---|---|"
    for one in learned:
        yield (
            f"| {one.method} | {one.rank} | {'used' if one.labels else 'for λ'} | {one.score.in_words()} | "
            f"{one.gain.in_words(sign=True) if one.gain else ''} | {one.over if one.gain else ''} | {one.seeds} | {one.seconds:.0f} |"
        )
    yield ""
    yield from (f"{sentence}\n" for sentence in beside_best(learned))


def _at(rank: str) -> str:
    return LOSSLESS if rank == LOSSLESS else f"at rank {rank}"


def best_without_data(scores: Scores, rank: str, on_tests: bool = False) -> Family | None:
    """The best on validation of all tasks at a rank, or on the tests, of those that learn nothing."""
    size = len(scores.tasks)
    those = [f for f in scores.families if (f.set, f.size, f.rank) == ("plain", size, rank) and f.space != SPACE]
    value = (lambda family: scores.score(family).value) if on_tests else scores.validation
    return max(those, key=value, default=None)
