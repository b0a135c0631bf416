# SPDX-License-Identifier: Apache-2.0
"""What the papers and the goals say, beside what was measured: held, failed, or not decided by this data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from benchmarks.quality.grid import FIRST, LOSSLESS
from benchmarks.quality.scores import Family, Interval, Scores

HELD, FAILED, UNDECIDED, UNMEASURED = "held", "failed", "undecided", "not measured yet"


@dataclass(frozen=True)
class Claim:
    """A sentence, where it is from, what came out, and the verdict."""

    text: str
    source: str
    verdict: str
    found: str


def claims(scores: Scores, rank: int | str) -> list[Claim]:
    """The papers' claims. rank: of the small results."""
    size = len(scores.tasks)
    plain = Family("plain", size, "ties", "knots", LOSSLESS)
    knots, ta = plain, plain.other(method="task_arithmetic", space="core")
    mixed_ta = ta.other(set="mixed")
    return [
        _above(scores, "KnOTS-TIES is above TIES", "KnOTS", knots, plain.other(space="delta")),
        _above(
            scores,
            "DO-Merging is above task arithmetic where norms are unequal",
            "DO-Merging",
            mixed_ta.other(method="do_merging", space="knots"),
            mixed_ta,
        ),
        _above(scores, "Iso-CTS is above KnOTS-TIES", "Iso-CTS", plain.other(method="iso_cts", space="core"), knots),
        _above(scores, "TSV-M is above KnOTS-TIES", "Core Space", plain.other(method="tsv_m", space="core"), knots),
        _best_at(scores, Family("plain", size, "ctm", "core", str(rank))),
        _lifted(scores, size, str(rank)),
    ]


def goals(scores: Scores, rank: int | str) -> list[Claim]:
    """The project's own, of chance-corrected scores; the best is the one that is best on validation."""
    size = len(scores.tasks)
    found = [
        _reaches(scores, f"{size} tasks: the best reaches 65 % lossless", 0.65, size, LOSSLESS),
        _reaches(scores, f"{size} tasks: the best reaches 60 % as one rank-{rank} adapter", 0.60, size, str(rank)),
        _reaches(scores, "four tasks: the best reaches 85 %", 0.85, 4, LOSSLESS),
    ]
    pairs = list(_osrm_pairs(scores, size, LOSSLESS))
    gain, cut = scores.mean_difference(pairs), scores.mean_difference(list(_osrm_pairs(scores, size, str(rank))))
    text = "OSRM adapters give at least 5 points more"
    if gain is None:
        return [*found, Claim(text, "goal", UNMEASURED, "")]
    verdict = HELD if gain.value >= 0.05 else FAILED
    at_rank = f"; at rank {rank} {cut.in_words(sign=True)}" if cut else ""
    facts = f"{gain.in_words(sign=True)}, the mean of {len(pairs)} methods, lossless{at_rank}"
    return [*found, Claim(text, "goal", verdict, facts)]


def _verdict(difference: Interval) -> str:
    return HELD if difference.low > 0 else FAILED if difference.high < 0 else UNDECIDED


def _above(scores: Scores, text: str, source: str, one: Family, two: Family) -> Claim:
    difference = scores.difference(one, two)
    if difference is None:
        return Claim(text, source, UNMEASURED, "")
    seeds = scores.common_seeds((one, two))
    own, other = scores.score(one, seeds, beside=two), scores.score(two, seeds, beside=one)
    both = f"{100 * own.value:.1f} against {100 * other.value:.1f}"
    fewer = f"; {counted(len(seeds), 'seed')}" if len(seeds) < scores.seeds else ""
    return Claim(text, source, _verdict(difference), f"{difference.in_words(sign=True)}; {both}{fewer}")


def _best_at(scores: Scores, family: Family) -> Claim:
    text = f"CtM is the best at rank {family.rank}"
    others = [
        f
        for f in scores.families
        if (f.set, f.size, f.rank) == (family.set, family.size, family.rank) and f.method != family.method
    ]
    if family not in scores.families or not others:
        return Claim(text, "CtM", UNMEASURED, "")
    rival = max(others, key=lambda other: scores.score(other).value)
    claim = _above(scores, text, "CtM", family, rival)
    return Claim(text, "CtM", claim.verdict, f"{claim.found}, {rival.method} in {rival.space}, of {len(others)} others")


def _osrm_pairs(scores: Scores, size: int, rank: str) -> Iterator[tuple[Family, Family]]:
    for method, space in FIRST:
        family = Family("osrm", size, method, space, rank)
        if family in scores.families and family.other(set="plain") in scores.families:
            yield family, family.other(set="plain")


def _lifted(scores: Scores, size: int, rank: str) -> Claim:
    """The verdict is of lossless merges; those of a rank stand beside them."""
    text = "OSRM lifts every method"
    known, cut = _osrm_gains(scores, size, LOSSLESS), _osrm_gains(scores, size, rank)
    if not known:
        return Claim(text, "OSRM", UNMEASURED, "")
    verdicts = [_verdict(difference) for difference in known.values()]
    verdict = FAILED if FAILED in verdicts else UNDECIDED if UNDECIDED in verdicts else HELD
    at_rank = f"; at rank {rank} {_counted_gains(cut)}" if cut else ""
    return Claim(text, "OSRM", verdict, _counted_gains(known) + at_rank)


def _osrm_gains(scores: Scores, size: int, rank: str) -> dict[str, Interval]:
    """By method and space."""
    differences = {f"{a.method} {a.space}": scores.difference(a, b) for a, b in _osrm_pairs(scores, size, rank)}
    return {name: difference for name, difference in differences.items() if difference is not None}


def _counted_gains(known: Mapping[str, Interval]) -> str:
    verdicts = [_verdict(difference) for difference in known.values()]
    worst, best = min(known, key=lambda n: known[n].value), max(known, key=lambda n: known[n].value)
    lowered = [name for name, verdict in zip(known, verdicts, strict=True) if verdict == FAILED]
    names = f" ({', '.join(lowered)})" if lowered else ""
    counts = f"{verdicts.count(HELD)} of {len(known)} lifted, {len(lowered)} lowered{names}"
    ends = f"from {100 * known[worst].value:+.1f} ({worst}) to {100 * known[best].value:+.1f} ({best})"
    return f"{counts}, {ends}"


def _reaches(scores: Scores, text: str, goal: float, size: int, rank: str) -> Claim:
    best = scores.best(set="plain", size=size, rank=rank)
    if best is None:
        return Claim(text, "goal", UNMEASURED, "")
    score = scores.score(best)
    verdict = HELD if score.value >= goal else FAILED
    found = f"{score.in_words()}, {best.method} in {best.space}"
    those = [f for f in scores.families if (f.set, f.size, f.rank) == ("plain", size, rank)]
    seeds = len(scores.families[best])
    if seeds < scores.seeds:
        found += f"; {counted(len(those), 'method')} measured, at {counted(seeds, 'seed')}"
    other = max(those, key=lambda family: scores.score(family).value)
    if other != best:
        found += f"; best on the tests, which choose nothing: {scores.score(other).in_words()}, {other.method} in {other.space}"
    return Claim(text, "goal", verdict, found)


def counted(count: int, one: str, several: str = "") -> str:
    """1 seed, 2 seeds."""
    return f"{count} {one if count == 1 else several or f'{one}s'}"
