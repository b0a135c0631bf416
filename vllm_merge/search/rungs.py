# SPDX-License-Identifier: Apache-2.0
"""Successive halving: many candidates on few examples, then fewer candidates on more (Jamieson and Talwalkar, AISTATS 2016)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vllm_merge.errors import UserInputError


@dataclass(frozen=True, slots=True)
class Rung:
    """How many candidates have answered the first `examples` examples when it is over."""

    candidates: int
    examples: int


def plan_rungs(candidates: int, examples: int, tasks: int, eta: int) -> list[Rung]:
    """The rungs: from one to the next, 1 of `eta` candidates stays, on `eta` times the examples; the last one has them all.

    The first rung has at least two examples of each task, where there are as many.
    """
    sizes = [candidates]
    while sizes[-1] > eta:
        sizes.append(math.ceil(sizes[-1] / eta))
    rungs = []
    for step, size in enumerate(sizes):
        share = math.ceil(examples / eta ** (len(sizes) - 1 - step))
        evenly = tasks * max(2, math.ceil(share / tasks))
        rungs.append(Rung(size, min(examples, evenly)))
    return rungs


def cost(rungs: Sequence[Rung]) -> int:
    """How many answers the rungs need; each candidate goes on from those that it has."""
    before, total = 0, 0
    for rung in rungs:
        total += rung.candidates * (rung.examples - before)
        before = rung.examples
    return total


def fit(candidates: int, examples: int, tasks: int, eta: int, most: int | None) -> list[Rung]:
    """The rungs with as many examples as `most` answers allow. Raises UserInputError where not even the least do."""
    full = plan_rungs(candidates, examples, tasks, eta)
    if most is None or cost(full) <= most:
        return full
    least = min(examples, 2 * tasks)
    low, high = least, examples  # cost grows with the examples
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cost(plan_rungs(candidates, middle, tasks, eta)) <= most else (low, middle - 1)
    found = plan_rungs(candidates, low, tasks, eta)
    if cost(found) > most:
        enough = most // least
        raise UserInputError(
            f"{candidates} candidates need at least {cost(found):,} answers, two of each task, and the budget has {most:,}; give "
            f"more --requests or at most {enough} --candidates"
        )
    return found
