# SPDX-License-Identifier: Apache-2.0
"""A goal at a growing number of prompts, each looked at once: what a multi-fidelity search scores its candidates by."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch

from vllm_merge.tuning.model import TuningModel
from vllm_merge.tuning.objective import Goal

FACTOR = 3  # η of Hyperband, as published
LEAST = 9  # the first size is a ninth of all, about the tenth as published


def sizes_of(most: int) -> list[int]:
    """Prompts of each task that a candidate is looked at on, one after the other: from a ninth of them to all."""
    least = -(-most // LEAST)
    found = [least]
    while found[-1] * FACTOR < most:
        found.append(found[-1] * FACTOR)
    return [*found, most] if found[-1] < most else found


class Samples:
    """A goal at the first sizes[0], sizes[1], … prompts of each task, drawn by the seed; the same for every candidate."""

    def __init__(self, goal: Goal, sizes: Sequence[int], seed: int) -> None:
        self._terms = [(term, term.data.parts(sizes, seed)) for term in goal.terms]
        self.rows = [
            sum(len(batch.tasks) for _, parts in self._terms for batch in parts[index]) for index in range(len(sizes))
        ]
        """Prompts that each size adds."""

    @torch.no_grad()
    def values(self, model: TuningModel) -> Iterator[float]:
        """The goal's value at each size, for the model as it is attached now. Every task counts alike, as in `Goal.value`."""
        sums: list[dict[str | None, float]] = [defaultdict(float) for _ in self._terms]
        counts: list[dict[str | None, int]] = [defaultdict(int) for _ in self._terms]
        for size in range(len(self.rows)):
            total = 0.0
            for (term, parts), mine, seen in zip(self._terms, sums, counts, strict=True):
                for batch in parts[size]:
                    for task, value in zip(batch.tasks, term.objective.rows(model, batch).tolist(), strict=True):
                        mine[task] += value
                        seen[task] += 1
                total += term.weight * sum(mine[task] / seen[task] for task in seen) / len(seen)
            yield total
