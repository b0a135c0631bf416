# SPDX-License-Identifier: Apache-2.0
"""Who fills the blocks of a candidate, one after the other: an agent that learns by PPO, or one that draws at random.

PPO as Reinforced Model Merging (arXiv:2503.21272) and its code have it: actor and critic are networks of two hidden layers
of 64 with tanh; the reward comes at the end of an episode, and returns are discounted and normalised over the episodes of an
update (Monte Carlo, which is GAE with λ = 1); an update is 40 steps of Adam on the clipped surrogate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from vllm_merge.errors import UserInputError

HIDDEN = 64
GAMMA, CLIP, EPOCHS = 0.99, 0.2, 40
ACTOR_RATE, CRITIC_RATE = 3e-4, 1e-3
CRITIC_SHARE, ENTROPY_SHARE = 0.5, 1e-4  # of the loss
FIRST_GAIN = 0.01  # of the actor's last layer: it begins with every source alike
MAX_STATE = 1 << 14  # numbers that the networks see


class Agent(Protocol):
    """Chooses a source for every block."""

    def episodes(self, count: int) -> Tensor:
        """Candidates, (count, blocks) int64: the source of every block."""
        ...

    def learn(self, choices: Tensor, rewards: Tensor) -> None:
        """From what its last episodes got. choices: as they were given; rewards: (count,) float32, larger is better."""
        ...

    def favourite(self) -> Tensor | None:
        """The candidate that it would choose now without trying anything, (blocks,) int64; None where it has none."""
        ...

    def state(self) -> dict[str, Tensor]:
        """All that its next episodes depend on."""
        ...

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state."""
        ...


class RandomAgent:
    """Draws every source alike and learns nothing: what an agent has to beat."""

    def __init__(self, blocks: int, sources: int, seed: int) -> None:
        self._blocks, self._sources = blocks, sources
        self._random = torch.Generator().manual_seed(seed)

    def episodes(self, count: int) -> Tensor:
        return torch.randint(self._sources, (count, self._blocks), generator=self._random)

    def learn(self, choices: Tensor, rewards: Tensor) -> None:
        return None

    def favourite(self) -> Tensor | None:
        return None

    def state(self) -> dict[str, Tensor]:
        return {"random": self._random.get_state()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        self._random.set_state(state["random"])


class PpoAgent:
    """Begins with every source alike, and learns.

    What it sees at block t are blocks · (sources + 1) numbers, each 0 or 1: which source every block before t has, one-hot,
    zeros for the blocks that have none yet, and t itself, one-hot.
    """

    def __init__(self, blocks: int, sources: int, seed: int) -> None:
        """Raises UserInputError where it would have to see more than MAX_STATE numbers."""
        if (size := blocks * (sources + 1)) > MAX_STATE:
            raise UserInputError(
                f"{blocks} blocks with {sources} sources are {size:,} numbers for the agent to see, which takes at most "
                f"{MAX_STATE:,}; choose a coarser --per, or fewer adapters"
            )
        self._blocks, self._sources = blocks, sources
        self._random = torch.Generator().manual_seed(seed)
        self._actor = _network(size, sources, FIRST_GAIN, self._random)
        self._critic = _network(size, 1, 1.0, self._random)
        groups = [(self._actor, ACTOR_RATE), (self._critic, CRITIC_RATE)]
        self._optimizer = torch.optim.Adam(
            [{"params": list(net.parameters()), "lr": rate} for net, rate in groups], fused=True
        )

    def episodes(self, count: int) -> Tensor:
        return self._filled(
            count, lambda logits: torch.multinomial(logits.softmax(-1), 1, generator=self._random)[:, 0]
        )

    def favourite(self) -> Tensor | None:
        return self._filled(1, lambda logits: logits.argmax(-1))[0]

    @torch.no_grad()
    def _filled(self, count: int, pick: Callable[[Tensor], Tensor]) -> Tensor:
        """Episodes, block by block. pick: sources (count,) of logits (count, sources)."""
        choices = torch.zeros(count, self._blocks, dtype=torch.int64)
        for block in range(self._blocks):
            choices[:, block] = pick(self._actor(self._seen(choices)[:, block]))
        return choices

    def _seen(self, choices: Tensor) -> Tensor:
        """What is seen at each block of episodes (count, blocks): (count, blocks, blocks · (sources + 1)) float32."""
        count, blocks = choices.shape
        taken = nn.functional.one_hot(choices, self._sources).float()[:, None]  # (count, 1, blocks, sources)
        before = torch.ones(blocks, blocks).tril(-1)[None, :, :, None]  # [t, b]: b is filled when t is chosen
        where = torch.eye(blocks).expand(count, blocks, blocks)
        return torch.cat([(taken * before).flatten(2), where], dim=-1)

    def learn(self, choices: Tensor, rewards: Tensor) -> None:
        seen = self._seen(choices)
        returns = _normalised(rewards[:, None] * GAMMA ** torch.arange(self._blocks - 1, -1, -1.0))
        with torch.no_grad():
            before = self._log_probabilities(seen, choices)[0]
            advantages = returns - self._critic(seen)[..., 0]
        for _ in range(EPOCHS):
            taken, entropy = self._log_probabilities(seen, choices)
            ratio = (taken - before).exp()
            surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
            error = (self._critic(seen)[..., 0] - returns).square()
            loss = (CRITIC_SHARE * error - surrogate - ENTROPY_SHARE * entropy).mean()
            self._optimizer.zero_grad()
            loss.backward()
            self._optimizer.step()

    def _log_probabilities(self, seen: Tensor, choices: Tensor) -> tuple[Tensor, Tensor]:
        """Of the sources that were chosen, and the entropy of all: (count, blocks) each."""
        logs = self._actor(seen).log_softmax(-1)
        return logs.gather(-1, choices[..., None])[..., 0], -(logs.exp() * logs).sum(-1)

    @property
    def _parameters(self) -> list[Tensor]:
        return [*self._actor.parameters(), *self._critic.parameters()]

    def state(self) -> dict[str, Tensor]:
        state = {"random": self._random.get_state()}
        for index, parameter in enumerate(self._parameters):
            state[f"parameter.{index}"] = parameter.detach()
            for name, value in self._optimizer.state[parameter].items():
                state[f"adam.{index}.{name}"] = value
        return state

    def load(self, state: Mapping[str, Tensor]) -> None:
        self._random.set_state(state["random"])
        for index, parameter in enumerate(self._parameters):
            parameter.data.copy_(state[f"parameter.{index}"])
            start = f"adam.{index}."
            self._optimizer.state[parameter] = {
                name.removeprefix(start): value.clone() for name, value in state.items() if name.startswith(start)
            }


def _network(inputs: int, outputs: int, gain: float, random: torch.Generator) -> nn.Sequential:
    """Orthogonal weights of this gain in the last layer, √2 in the others; no biases at first."""
    layers = [nn.Linear(inputs, HIDDEN), nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, outputs)]
    for layer, its_gain in zip(layers, (math.sqrt(2), math.sqrt(2), gain), strict=True):
        nn.init.orthogonal_(layer.weight, its_gain, generator=random)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])


def _normalised(returns: Tensor) -> Tensor:
    """With mean 0 and standard deviation 1; zeros where all are alike."""
    centred = returns - returns.mean()
    return centred / (centred.square().mean().sqrt() + 1e-7)
