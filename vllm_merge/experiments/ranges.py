# SPDX-License-Identifier: Apache-2.0
"""Which part of [0, 1) belongs to which arm, and how it changes while as few units as possible change their arm.

An experiment begins with GrowthBook's ranges: arm after arm, each from where its full share begins, so that coverage grows
into free room. Weights that change later are another matter: shifting every boundary moves units between arms that nobody
touched, and no rule that looks at the new weights alone can avoid that for three arms or more. So the new ranges are made
from those before: an arm that shrinks gives up the end of what it has, and one that grows takes from what is free.
"""

from __future__ import annotations

from collections.abc import Mapping

Interval = tuple[float, float]
Ranges = Mapping[str, tuple[Interval, ...]]  # of each arm: disjoint, ascending

PLACES = 10_000  # the hash has so many values; ranges end between them


def first_ranges(weights: Mapping[str, float], coverage: float) -> dict[str, tuple[Interval, ...]]:
    """GrowthBook's ranges. weights add up to 1; coverage: the share of every arm's room that is used, 0 to 1."""
    ranges: dict[str, tuple[Interval, ...]] = {}
    start = 0.0
    for arm, weight in weights.items():
        ranges[arm] = ((start, start + coverage * weight),)
        start += weight
    return ranges


def next_ranges(before: Ranges, weights: Mapping[str, float], coverage: float) -> dict[str, tuple[Interval, ...]]:
    """Ranges of these sizes in which no more units than necessary have another arm, or none, than in `before`.

    GrowthBook's own ranges where they are as good. Sizes are exact to one of the hash's 10,000 places.
    """
    plain = first_ranges(weights, coverage)
    old, new = _owners(before), _owners(plain)
    wanted = {arm: sum(1 for owner in new if owner == arm) for arm in weights}
    have = {arm: sum(1 for owner in old if owner == arm) for arm in weights}
    necessary = sum(max(0, have[arm] - wanted[arm]) for arm in weights)
    moved = sum(1 for a, b in zip(old, new, strict=True) if a in weights and a != b)
    if moved <= necessary:
        return plain
    owners = [arm if arm in weights else None for arm in old]
    for arm in weights:
        surplus = have[arm] - wanted[arm]
        for place in range(PLACES - 1, -1, -1):
            if surplus > 0 and owners[place] == arm:
                owners[place] = None
                surplus -= 1
    growing = {arm: wanted[arm] - have[arm] for arm in weights if wanted[arm] > have[arm]}
    for place in range(PLACES):
        if owners[place] is None and growing:
            arm = next(iter(growing))
            owners[place] = arm
            growing[arm] -= 1
            if growing[arm] == 0:
                del growing[arm]
    return {arm: _intervals(owners, arm) for arm in weights}


def _owners(ranges: Ranges) -> list[str | None]:
    """The arm of each of the hash's places."""
    owners: list[str | None] = [None] * PLACES
    for arm, intervals in ranges.items():
        for start, end in intervals:
            for place in range(_first_place(start), _first_place(end)):
                owners[place] = arm
    return owners


def _first_place(edge: float) -> int:
    """The first place at or after `edge`: the smallest p with p / PLACES >= edge, as the hash is compared."""
    place = min(PLACES, max(0, round(edge * PLACES)))
    while place > 0 and (place - 1) / PLACES >= edge:
        place -= 1
    while place < PLACES and place / PLACES < edge:
        place += 1
    return place


def _intervals(owners: list[str | None], arm: str) -> tuple[Interval, ...]:
    found: list[Interval] = []
    start: int | None = None
    for place, owner in enumerate([*owners, None]):
        if owner == arm and start is None:
            start = place
        elif owner != arm and start is not None:
            found.append((start / PLACES, place / PLACES))
            start = None
    return tuple(found)
