# SPDX-License-Identifier: Apache-2.0
"""What every learner has in common: steps, a value of what it would leave behind, and a state to go on from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from vllm_merge.adapters.factors import Adapter
from vllm_merge.tuning.blocks import Blocks


@dataclass(frozen=True)
class Learned:
    """What a recipe is written from: weights (modules, n) float64 as it writes them, adapters that replace the recipe's, or
    blocks of several merges.

    scale: λ of the sum of such adapters. With none of them it is the recipe as it was.
    """

    weights: Tensor | None = None
    blocks: Blocks | None = None
    adapters: tuple[Adapter, ...] = ()
    scale: float = 1.0


class Learner(Protocol):
    """Learns in steps.

    steps: how many there are at most, None for any number. done: how many were made. checks: how often a whole run asks
    for `value`, at its end included.
    """

    @property
    def steps(self) -> int | None: ...

    @property
    def done(self) -> int: ...

    @property
    def checks(self) -> int: ...

    def step(self) -> float:
        """Make one step; the loss on the data that it looked at, NaN where it could not be had: nothing has changed then."""
        ...

    def value(self) -> float:
        """The value of `learned()` on all data, the smaller the better; before the first step, that of the recipe."""
        ...

    def notes(self) -> list[str]:
        """What is worth knowing about what it has learned, in sentences."""
        ...

    def learned(self) -> Learned:
        """What it has learned so far."""
        ...

    def state(self) -> dict[str, Tensor]:
        """All that the next step depends on, beside `done`."""
        ...

    def load(self, state: Mapping[str, Tensor], done: int) -> None:
        """Go on from a state."""
        ...
