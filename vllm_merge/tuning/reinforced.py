# SPDX-License-Identifier: Apache-2.0
"""Reinforced Model Merging (arXiv:2503.21272): an agent fills the blocks of the model, each from one of several sources.

An episode is a candidate; its reward is what it is better than the start, on one subset of the prompts. A few candidates that
promise the most are looked at on all prompts, and the best of these is what is learned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from vllm_merge.errors import MergeError
from vllm_merge.tuning.blocks import Blocks, Source
from vllm_merge.tuning.learner import Learned
from vllm_merge.tuning.policy import Agent, PpoAgent, RandomAgent

AgentName = Literal["ppo", "random"]
AGENTS: Mapping[AgentName, Callable[[int, int, int], Agent]] = {"ppo": PpoAgent, "random": RandomAgent}

Choice = tuple[int, ...]
"""The source of every block."""
Score = Callable[[Choice, int | None], float]
"""The goal's value of a candidate on one of the subsets, or on all prompts where that is None."""

EPISODES = 4  # in a step, as published
SMOOTHING = 0.8  # at the last step, of the dynamic average reward, as published
LOOK = 10  # steps from one look at all prompts to the next
LOOKED_AT = 2  # candidates at such a look
WHOLE = -1  # the subset that all prompts are, in a saved state


class Candidates(Protocol):
    """What they are made of, `pool.Pool`."""

    @property
    def groups(self) -> int: ...

    @property
    def sources(self) -> Sequence[Source]: ...

    def blocks(self, choice: Choice) -> Blocks: ...

    def words(self, choice: Choice) -> str: ...


class Reinforced:
    """A step is EPISODES candidates on the same subset, and an update of the agent. The first source of all blocks is the start.

    The rewards are smoothed as published (dynamic average reward): r ← κ r_before + (1 − κ) r with κ = SMOOTHING · step / steps,
    r_before the smoothed reward of the episode before, and begun anew whenever the subsets have all been used.
    """

    steps: int | None = None
    checks = 1_000_000  # the value of the best is known at every step

    def __init__(
        self,
        score: Score,
        pool: Candidates,
        *,
        subsets: int,
        planned: int,
        agent: AgentName,
        seed: int,
    ) -> None:
        """planned: the steps of the whole run, at whose end all prompts are looked at."""
        self._score, self._pool = score, pool
        self._start: Choice = (0,) * pool.groups
        self._subsets, self._planned = subsets, planned
        self._agent = AGENTS[agent](pool.groups, len(pool.sources), seed)
        self._known: dict[tuple[Choice, int], float] = {}
        self._smoothed = math.nan
        self.done = 0

    def step(self) -> float:
        subset = self.done % self._subsets
        choices = self._agent.episodes(EPISODES)
        candidates = [tuple(choice) for choice in choices.tolist()]
        values = [self._value(candidate, subset) for candidate in candidates]
        finite = [value for value in values if math.isfinite(value)]
        if not finite:
            return math.nan
        start = self._value(self._start, subset)
        gains = [start - (value if math.isfinite(value) else max(finite)) for value in values]
        self._agent.learn(choices, torch.tensor(self._smooth(gains, anew=subset == 0)))
        self.done += 1
        if self.done % LOOK == 0 or self.done == self._planned:
            for candidate in self._promising():
                self._value(candidate, WHOLE)
        return sum(finite) / len(finite)

    def _value(self, candidate: Choice, subset: int) -> float:
        """Of the goal, looked at once; infinite for a candidate that has none."""
        if (candidate, subset) not in self._known:
            try:
                value = self._score(candidate, None if subset == WHOLE else subset)
            except MergeError:
                value = math.inf
            self._known[candidate, subset] = value if math.isfinite(value) else math.inf
        return self._known[candidate, subset]

    def _smooth(self, gains: list[float], *, anew: bool) -> list[float]:
        share = SMOOTHING * (self.done + 1) / self._planned
        rewards = []
        for gain in gains:
            self._smoothed = gain if anew else share * self._smoothed + (1 - share) * gain
            rewards.append(self._smoothed)
            anew = False
        return rewards

    def _promising(self) -> list[Choice]:
        """Those to be looked at on all prompts: what the agent would choose now, and the best that it tried."""
        gains: dict[Choice, list[float]] = {}
        for (candidate, subset), value in self._known.items():
            if subset != WHOLE and (candidate, WHOLE) not in self._known:
                gains.setdefault(candidate, []).append(self._known[self._start, subset] - value)
        favourite = self._agent.favourite()
        first = [] if favourite is None else [tuple(favourite.tolist())]
        best = sorted(gains, key=lambda candidate: -sum(gains[candidate]) / len(gains[candidate]))
        return list(dict.fromkeys([*first, *best]))[:LOOKED_AT]

    @property
    def _best(self) -> Choice:
        whole = {candidate: value for (candidate, subset), value in self._known.items() if subset == WHOLE}
        return min(whole, key=whole.__getitem__)

    def value(self) -> float:
        self._value(self._start, WHOLE)
        return self._known[self._best, WHOLE]

    def learned(self) -> Learned:
        return Learned() if self._best == self._start else Learned(blocks=self._pool.blocks(self._best))

    def notes(self) -> list[str]:
        """How many candidates were looked at, and what the best is of."""
        whole = sum(subset == WHOLE for _, subset in self._known)
        tried = len({candidate for candidate, subset in self._known if subset != WHOLE})
        looked = f"{tried} candidates were looked at on a subset of the prompts, {whole} on all of them"
        best = self._best
        return [looked] if best == self._start else [looked, f"blocks of the best: {self._pool.words(best)}"]

    def state(self) -> dict[str, Tensor]:
        keys = list(self._known)
        return {
            "candidates": torch.tensor([candidate for candidate, _ in keys], dtype=torch.int64),
            "subsets": torch.tensor([subset for _, subset in keys], dtype=torch.int64),
            "values": torch.tensor([self._known[key] for key in keys], dtype=torch.float64),
            "smoothed": torch.tensor(self._smoothed, dtype=torch.float64),
            **{f"agent.{name}": value for name, value in self._agent.state().items()},
        }

    def load(self, state: Mapping[str, Tensor], done: int) -> None:
        rows = zip(state["candidates"].tolist(), state["subsets"].tolist(), state["values"].tolist(), strict=True)
        self._known = {(tuple(candidate), subset): value for candidate, subset, value in rows}
        self._smoothed = float(state["smoothed"])
        self._agent.load({n.removeprefix("agent."): v for n, v in state.items() if n.startswith("agent.")})
        self.done = done
