# SPDX-License-Identifier: Apache-2.0
"""Merges that learned, beside those that did not: a table, and the goals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.quality.claims import FAILED, HELD, UNMEASURED, Claim
from benchmarks.quality.grid import LOSSLESS
from benchmarks.quality.records import Row
from benchmarks.quality.scores import Family, Scores

GOAL = 0.85
SPACE = "learned"  # of the families of learned merges


def with_learned(rows: Sequence[Row], tasks: Sequence[str]) -> Scores:
    """The scores of all merges, learned ones among them as families whose space is SPACE."""
    as_merges = [
        {**row, "kind": "merge", "space": SPACE, "stage": SPACE, "merge_seconds": row["seconds"]}
        for row in rows
        if row["kind"] == "learned"
    ]
    return Scores([*(row for row in rows if row["kind"] != "learned"), *as_merges], tasks)


def learned_goals(scores: Scores, rank: int | str) -> list[Claim]:
    """Of scores with learned merges: the best on validation reaches GOAL; each beats the best without data."""
    found = []
    best = scores.best(set="plain", size=len(scores.tasks), space=SPACE, rank=LOSSLESS)
    text = f"{len(scores.tasks)} tasks: the best learned merge reaches {100 * GOAL:.0f} % lossless"
    if best is None:
        return [Claim(text, "goal", UNMEASURED, "")]
    score = scores.score(best)
    found.append(Claim(text, "goal", HELD if score.value >= GOAL else FAILED, f"{score.in_words()}, {best.method}"))
    for at in (LOSSLESS, str(rank)):
        rival = best_without_data(scores, at)
        mine = [family for family in _learned(scores) if family.rank == at]
        gains = [gain for family in mine if rival and (gain := scores.difference(family, rival))]
        if rival is None or not gains:
            continue
        above = sum(gain.value > 0 for gain in gains)
        facts = f"{above} of {len(gains)} above {rival.method} in {rival.space}"
        where = "lossless" if at == LOSSLESS else f"at rank {at}"
        found.append(
            Claim(
                f"each learned merge beats the best without data, {where}",
                "goal",
                HELD if above == len(gains) else FAILED,
                facts,
            )
        )
    return found


def learned_table(scores: Scores, rows: Sequence[Row]) -> Iterator[str]:
    """Score, seconds and gain of each learned merge, the best first."""
    families = sorted(_learned(scores), key=lambda family: -scores.score(family).value)
    if not families:
        return
    runs = [row for row in rows if row["kind"] == "learned"]
    yield f"## Merges that learn, {len(scores.tasks)} tasks\n"
    yield "By `vllm-merge tune` from the plain adapters and the validation examples, from task arithmetic (AdaMerging++ from KnOTS-TIES). Gain:"
    yield "over the best merge of the same rank that learns nothing, on the same seeds. Score and gain in %, with 95 % intervals."
    jobs = max((row.get("jobs", 1) for row in runs), default=1)
    yield f"Seconds are those of learning, on a device that up to {jobs} learners shared.\n"
    yield "| method | rank | labels | score | gain | over | seeds | seconds |\n|---|---|---|---|---|---|---|---|"
    for family in families:
        rival = best_without_data(scores, family.rank)
        gain = scores.difference(family, rival) if rival is not None else None
        labels = "used" if any(row["labels"] for row in runs if row["method"] == family.method) else "for λ"
        yield (
            f"| {family.method} | {family.rank} | {labels} | {scores.score(family).in_words()} | "
            f"{gain.in_words(sign=True) if gain else ''} | {f'{rival.method} {rival.space}' if rival and gain else ''} | "
            f"{len(scores.families[family])} | {scores.seconds(family):.0f} |"
        )
    yield ""


def best_without_data(scores: Scores, rank: str) -> Family | None:
    """The best on validation of all tasks at a rank, of those that learn nothing."""
    size = len(scores.tasks)
    those = [f for f in scores.families if (f.set, f.size, f.rank) == ("plain", size, rank) and f.space != SPACE]
    return max(those, key=scores.validation, default=None)


def _learned(scores: Scores) -> list[Family]:
    return [family for family in scores.families if family.space == SPACE]
