# SPDX-License-Identifier: Apache-2.0
"""The order in which examples are asked: shuffled, and every first part of it has as many of each task as can be."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import zip_longest


def in_turns(tasks: Sequence[str], seed: int) -> list[int]:
    """The indices of examples whose tasks these are, one of each task in turn, shuffled within a task."""
    groups: dict[str, list[int]] = {}
    for index, task in enumerate(tasks):
        groups.setdefault(task, []).append(index)
    for task, group in groups.items():
        random.Random(f"{seed} {task}").shuffle(group)
    return [index for round_ in zip_longest(*groups.values()) for index in round_ if index is not None]
