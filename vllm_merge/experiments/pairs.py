# SPDX-License-Identifier: Apache-2.0
"""A request that two arms answered: one its client, the other (the shadow) nobody. What the two answers have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

OK = "ok"


@dataclass(frozen=True)
class Pair:
    """One exposure and one other arm. Token counts, seconds, natural logarithms; None where it was not compared.

    exposure: the id of the client's request. arm: who answered its client; shadow: the other arm. outcome: `ok`, or why there is
    nothing to compare: `too_many`, `busy`, `unavailable`, `timeout`, `failed`. agreement, equal: see `agreement`.
    preferred: by the judge, 1: the shadow's answer, 0: the other one, 0.5: neither.
    positions: how many next-token distributions were compared; kl, missing, shadow_missing: their means (`divergence`).
    """

    exposure: str
    at: float
    experiment: str
    version: int
    arm: str
    shadow: str
    outcome: str
    unit: str = ""
    streaming: bool = False
    tokens: int | None = None
    shadow_tokens: int | None = None
    agreement: float | None = None
    equal: bool | None = None
    seconds: float | None = None
    shadow_seconds: float | None = None
    first_token: float | None = None
    shadow_first_token: float | None = None
    positions: int | None = None
    kl: float | None = None
    missing: float | None = None
    shadow_missing: float | None = None
    preferred: float | None = None


def agreement(first: Sequence[int], second: Sequence[int]) -> float:
    """How far two answers go together: tokens before the first difference, as a share of the longer answer. 1: they are equal."""
    longest = max(len(first), len(second))
    if longest == 0:
        return 1.0
    together = next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )
    return together / longest
