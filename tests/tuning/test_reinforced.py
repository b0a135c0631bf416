# SPDX-License-Identifier: Apache-2.0
"""RMM: the agent learns what random draws do not find, rewards are of subsets, and a run goes on where it ended."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vllm_merge import MergeError, UserInputError
from vllm_merge.tuning import policy, reinforced
from vllm_merge.tuning.blocks import Blocks, Source
from vllm_merge.tuning.learner import Learned
from vllm_merge.tuning.policy import PpoAgent, RandomAgent
from vllm_merge.tuning.reinforced import EPISODES, LOOK, LOOKED_AT, SMOOTHING, AgentName, Choice, Reinforced
from vllm_merge.tuning.run import Run
from vllm_merge.tuning.state import Progress, load_state, save_state

GROUPS, SOURCES, SUBSETS, STEPS = 5, 8, 4, 30


@dataclass(frozen=True)
class Few:
    """Blocks 0, 1, … of as many modules."""

    groups: int = GROUPS
    sources: tuple[Source, ...] = tuple(Source.alone(str(index)) for index in range(SOURCES))

    def blocks(self, choice: Choice) -> Blocks:
        return Blocks(self.sources, {str(block): str(source) for block, source in enumerate(choice)})

    def words(self, choice: Choice) -> str:
        return str(choice)


class Problem:
    """A cost for every source of a block, and one for every pair of sources side by side; subsets see them with an error.

    The errors of all subsets add up to nothing, and subsets are easier and harder as a whole.
    """

    def __init__(self, seed: int) -> None:
        random = torch.Generator().manual_seed(seed)
        self._alone = torch.rand(GROUPS, SOURCES, generator=random)
        self._beside = 0.5 * torch.rand(GROUPS - 1, SOURCES, SOURCES, generator=random)
        self._error = 0.3 * torch.randn(SUBSETS, GROUPS, SOURCES, generator=random)
        self._error -= self._error.mean(0)
        self._error += torch.arange(SUBSETS)[:, None, None] - (SUBSETS - 1) / 2
        self.asked: list[tuple[Choice, int | None]] = []

    def __call__(self, choice: Choice, subset: int | None) -> float:
        self.asked.append((choice, subset))
        table = self._alone if subset is None else self._alone + self._error[subset]
        alone = sum(float(table[block, source]) for block, source in enumerate(choice))
        return alone + sum(float(self._beside[block, *pair]) for block, pair in enumerate(pairwise(choice)))

    @property
    def prompts(self) -> int:
        """Looked at, in subsets."""
        return sum(SUBSETS if subset is None else 1 for _, subset in self.asked)


def learner(problem: Callable[[Choice, int | None], float], agent: AgentName = "ppo", seed: int = 0) -> Reinforced:
    return Reinforced(problem, Few(), subsets=SUBSETS, planned=STEPS, agent=agent, seed=seed)


def choice_of(found: Learned) -> Choice:
    return (0,) * GROUPS if found.blocks is None else tuple(int(found.blocks.choice[str(b)]) for b in range(GROUPS))


def test_it_learns_what_random_draws_do_not_find() -> None:
    """On the mean of four problems, with no more prompts; what it says is best is what it says it is."""
    found: dict[AgentName, list[float]] = {"ppo": [], "random": []}
    looked: dict[AgentName, int] = {"ppo": 0, "random": 0}
    for seed in range(4):
        for agent in found:
            problem = Problem(seed)
            run = learner(problem, agent, seed)
            start = run.value()
            for _ in range(STEPS):
                run.step()
            looked[agent] += problem.prompts
            found[agent].append(run.value())
            assert run.value() == problem(choice_of(run.learned()), None) < start
    assert sum(found["ppo"]) < sum(found["random"]) - 0.5
    assert looked["ppo"] <= looked["random"]


def test_the_same_seed_gives_the_same() -> None:
    def losses(seed: int) -> list[float]:
        run = learner(Problem(0), seed=seed)
        run.value()
        return [run.step() for _ in range(3)]

    assert losses(1) == losses(1)
    assert losses(1) != losses(2)


def test_a_step_is_of_one_subset_and_all_prompts_are_rare() -> None:
    problem = Problem(0)
    run = learner(problem, "random")
    run.value()
    start = (0,) * GROUPS
    assert problem.asked == [(start, None)]
    for step in range(LOOK):
        problem.asked.clear()
        run.step()
        subsets = [subset for _, subset in problem.asked if subset is not None]
        assert set(subsets) == {step % SUBSETS}
        new = [choice for choice, subset in problem.asked if subset is not None]
        assert len(new) == EPISODES + (step < SUBSETS)  # the start too, once on each
        assert (start in new) == (step < SUBSETS)
        whole = [choice for choice, subset in problem.asked if subset is None]
        assert len(whole) == (LOOKED_AT if step == LOOK - 1 else 0)
    assert run.notes() == [
        f"{EPISODES * LOOK + 1} candidates were looked at on a subset of the prompts, 3 on all of them",
        f"blocks of the best: {choice_of(run.learned())}",
    ]


def test_nothing_is_looked_at_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RandomAgent, "episodes", lambda own, count: torch.ones(count, GROUPS, dtype=torch.int64))
    problem = Problem(0)
    run = learner(problem, "random")
    run.value()
    for _ in range(3 * SUBSETS):
        run.step()
    both = ((1,) * GROUPS, (0,) * GROUPS)
    assert sorted(problem.asked, key=str) == sorted(((c, s) for c in both for s in (*range(SUBSETS), None)), key=str)


def test_rewards_are_gains_over_the_start_and_smoothed_as_published(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    monkeypatch.setattr(RandomAgent, "learn", lambda own, choices, rewards: seen.append(rewards))
    problem = Problem(0)
    drawn = RandomAgent(GROUPS, SOURCES, 0)
    run = learner(problem, "random")
    before = math.nan
    for step in range(SUBSETS + 1):
        run.step()
        share, expected = SMOOTHING * (step + 1) / STEPS, []
        for episode, candidate in enumerate(drawn.episodes(EPISODES).tolist()):
            subset = step % SUBSETS
            gain = problem((0,) * GROUPS, subset) - problem(tuple(candidate), subset)
            before = gain if subset == episode == 0 else share * before + (1 - share) * gain
            expected.append(before)
        assert seen[-1].tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("agent", "stop"), [("ppo", 3), ("random", LOOK - 1), ("random", LOOK)])
def test_it_goes_on_where_it_ended(agent: AgentName, stop: int, tmp_path: Path) -> None:
    """Through the file, with nothing looked at again."""
    problems = [Problem(4) for _ in range(3)]
    whole, first, second = (learner(problem, agent, 5) for problem in problems)
    whole.value(), first.value()
    losses = [whole.step() for _ in range(LOOK + 2)]
    begun = [first.step() for _ in range(stop)]
    save_state(tmp_path, {}, Progress(), first.state(), None)
    second.load(load_state(tmp_path, {})[1], first.done)
    assert begun + [second.step() for _ in range(LOOK + 2 - stop)] == losses
    assert second.learned() == whole.learned()
    assert second.value() == whole.value()
    assert second.notes() == whole.notes()
    assert problems[1].asked + problems[2].asked == problems[0].asked


def test_a_stopped_run_ends_as_a_whole_one(tmp_path: Path) -> None:
    """The loop around it, which asks for the value when it is stopped."""

    def go(folder: Path, stop: int, resume: bool) -> Learned:
        mine = learner(Problem(2), "random")
        run = Run(mine, folder, {}, STEPS)
        if resume:
            run.resume()
        ended = run.go(lambda done, total, best: None, lambda: mine.done >= stop)
        assert ended.stopped == (stop < STEPS)
        assert ended.progress.best == mine.value()
        return ended.learned

    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    expected = go(tmp_path / "whole", STEPS, False)
    go(tmp_path / "parts", 13, False)
    assert go(tmp_path / "parts", STEPS, True) == expected
    assert expected.blocks is not None


def test_candidates_without_a_value_lose() -> None:
    problem = Problem(1)

    def picky(choice: Choice, subset: int | None) -> float:
        if choice[0] == 1:
            raise MergeError("the merged weight change is not finite")
        return math.nan if choice[1] == 2 else problem(choice, subset)

    run = learner(picky)
    run.value()
    for _ in range(LOOK):
        assert math.isfinite(run.step())
    best = choice_of(run.learned())
    assert best[0] != 1
    assert best[1] != 2

    broken = learner(lambda choice, subset: math.nan if choice != (0,) * GROUPS else 1.0)
    assert broken.value() == 1.0
    assert math.isnan(broken.step())
    assert broken.learned() == Learned()  # the recipe as it was
    assert not math.isfinite(learner(lambda choice, subset: math.nan).value())


def test_what_the_agent_sees() -> None:
    agent = PpoAgent(3, 2, 0)
    seen = agent._seen(torch.tensor([[1, 0, 1]]))
    assert seen.shape == (1, 3, 9)
    assert seen[0].tolist() == [
        [0, 0, 0, 0, 0, 0, 1, 0, 0],
        [0, 1, 0, 0, 0, 0, 0, 1, 0],
        [0, 1, 1, 0, 0, 0, 0, 0, 1],
    ]


def test_it_begins_with_every_source_alike_and_comes_to_prefer_one() -> None:
    agent = PpoAgent(GROUPS, SOURCES, 0)
    drawn = agent.episodes(400)
    counts = torch.bincount(drawn.flatten(), minlength=SOURCES) / drawn.numel()
    assert float((counts - 1 / SOURCES).abs().max()) < 0.04
    for _ in range(40):
        choices = agent.episodes(EPISODES)
        agent.learn(choices, (choices == 3).float().sum(1))
    assert float((agent.episodes(100) == 3).float().mean()) > 0.8
    favourite = agent.favourite()
    assert favourite is not None
    assert favourite.tolist() == [3] * GROUPS


def test_equal_rewards_teach_nothing_that_is_not_finite() -> None:
    agent = PpoAgent(GROUPS, SOURCES, 0)
    for reward in (0.0, 1.0):
        agent.learn(agent.episodes(EPISODES), torch.full((EPISODES,), reward))
    assert all(bool(value.isfinite().all()) for value in agent.state().values())


def test_what_the_agent_sees_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "MAX_STATE", 45)
    PpoAgent(5, 8, 0)
    with pytest.raises(
        UserInputError, match=r"6 blocks with 8 sources are 54 numbers .* at most 45; choose a coarser --per"
    ):
        PpoAgent(6, 8, 0)
    with pytest.raises(UserInputError, match="--per"):
        Reinforced(Problem(0), Few(groups=6), subsets=1, planned=1, agent="ppo", seed=0)
    assert reinforced.AGENTS["random"](6, 8, 0).episodes(2).shape == (2, 6)
