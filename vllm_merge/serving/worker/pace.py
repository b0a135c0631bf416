# SPDX-License-Identifier: Apache-2.0
"""How fast a worker's own merges were, by kind; what to expect of the next where no device like it was measured."""

from __future__ import annotations

from collections import OrderedDict

from vllm_merge.recipe.plan import Plan

KINDS = 64  # that are remembered
WEIGHT_OF_LATEST = 0.3  # in the running mean


def kind_of(plan: Plan) -> str:
    """`method/space` of every stage: what decides, with the size, how long a merge takes."""
    return "+".join(f"{stage.merge_method}/{stage.space}" for stage in plan.stages)


class Pace:
    """Seconds per parameter of the result, by kind, the latest learnt last."""

    def __init__(self) -> None:
        self._paces: OrderedDict[str, float] = OrderedDict()

    def learn(self, plan: Plan, seconds: float, parameters: int) -> None:
        """A merge took `seconds`, its inputs read and its result in place."""
        kind, found = kind_of(plan), seconds / parameters
        before = self._paces.pop(kind, found)
        self._paces[kind] = before + WEIGHT_OF_LATEST * (found - before)
        if len(self._paces) > KINDS:
            self._paces.popitem(last=False)

    def describe(self) -> dict[str, float]:
        return dict(self._paces)
