# SPDX-License-Identifier: Apache-2.0
"""Prompts as tokens: padded batches in which every token of an answer is known as one."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_merge.errors import UserInputError
from vllm_merge.tuning.data import Prompt, PromptSet
from vllm_merge.tuning.model import TuningModel

ROWS = 32  # sequences that are run at once


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences padded on the right. ids, there, answered: (rows, length); there: no padding; answered: answer tokens.

    tasks: of every row. weights: (rows,) float32, what each row counts in a mean over the tasks of the whole set.
    """

    ids: Tensor
    there: Tensor
    answered: Tensor
    tasks: tuple[str | None, ...]
    weights: Tensor

    def prompts(self) -> list[list[int]]:
        """The tokens of each row without its answer."""
        keep = self.there & ~self.answered
        return [ids[mask].tolist() for ids, mask in zip(self.ids, keep, strict=True)]


def padded(
    sequences: Sequence[tuple[list[int], list[int]]],
    tasks: Sequence[str | None],
    weights: Sequence[float],
    pad: int,
    device: torch.device,
) -> Batch:
    """The batch of (prompt tokens, answer tokens), in order."""
    width = max(len(prompt) + len(answer) for prompt, answer in sequences)
    ids = torch.full((len(sequences), width), pad)
    there = torch.zeros(ids.shape, dtype=torch.bool)
    answered = torch.zeros(ids.shape, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(sequences):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor([*prompt, *answer])
        there[row, :end] = True
        answered[row, len(prompt) : end] = True
    at = torch.tensor(weights, dtype=torch.float32)
    return Batch(ids.to(device), there.to(device), answered.to(device), tuple(tasks), at.to(device))


class Encoded:
    """A prompt set as tokens, and batches of it. Every task counts alike, and so does every prompt of a task."""

    def __init__(self, data: PromptSet, model: TuningModel, *, answers: bool, room: int = 0) -> None:
        """answers: with the answers' tokens. room: tokens that an answer may get, where there is none.

        Raises UserInputError with the line of a prompt that the model's context does not hold, its answer included.
        """
        self.data, self._model = data, model
        self._tokens = [self._encoded(prompt, answers, room) for prompt in data.prompts]
        self._by_task = {
            task: [index for index, prompt in enumerate(data.prompts) if prompt.task == task] for task in data.tasks
        }

    def _encoded(self, prompt: Prompt, answers: bool, room: int) -> tuple[list[int], list[int]]:
        tokens, answer = self._model.tokens(prompt.prompt, prompt.answer if answers else None, ends=prompt.ends)
        length, context = len(tokens) + max(len(answer), 0 if answer else room), self._model.context
        if length > context:
            what = f"prompt and answer are {length} tokens" if answer else f"the prompt is {len(tokens)} tokens long"
            left = "" if answer else f", and its answer may have {room}"
            raise UserInputError(
                f"{self.data.path}:{prompt.line}: {what}{left}; the model's context holds {context}; shorten or remove it"
            )
        return tokens, answer

    @property
    def most(self) -> int:
        """Prompts of the task that has most."""
        return max(len(mine) for mine in self._by_task.values())

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with its answer."""
        return max(len(prompt) + len(answer) for prompt, answer in self._tokens)

    def all(self) -> list[Batch]:
        """Everything, in batches of at most ROWS rows of similar length."""
        return self._batches(list(range(len(self._tokens))))

    def drawn(self, of_each: int, seed: int, step: int) -> list[Batch]:
        """`of_each` prompts of each task, the same for the same seed and step; all of a task that has fewer."""
        rng = random.Random(f"{seed}/{step}")
        return self._batches([i for mine in self._by_task.values() for i in rng.sample(mine, min(of_each, len(mine)))])

    def passes(self, of_each: int, seed: int) -> list[list[Batch]]:
        """Every prompt once, `of_each` of each task at a time, in an order drawn from the seed."""
        return self.parts([*range(of_each, self.most, of_each), self.most], seed)

    def subsets(self, of_each: int) -> int:
        """How many subsets of `of_each` prompts of each task it takes to have every prompt in one."""
        return math.ceil(max(len(mine) for mine in self._by_task.values()) / of_each)

    def subset(self, number: int, of_each: int, seed: int) -> list[Batch]:
        """The prompts of one subset, of every task those that follow the subset before in an order drawn from the seed.

        A task of fewer prompts begins again at its end.
        """
        chosen: dict[int, None] = {}
        for task, mine in self._by_task.items():
            order = random.Random(f"{seed}/{task}").sample(mine, len(mine))
            chosen.update({order[(number * of_each + more) % len(order)]: None for more in range(of_each)})
        return self._batches(list(chosen))

    def parts(self, sizes: Sequence[int], seed: int) -> list[list[Batch]]:
        """What each size adds to the one before: prompts of each task, in an order drawn from the seed. sizes: rising."""
        shuffled = [random.Random(f"{seed}/{task}").sample(mine, len(mine)) for task, mine in self._by_task.items()]
        return [
            self._batches([index for mine in shuffled for index in mine[start:end]])
            for start, end in zip((0, *sizes), sizes, strict=False)
        ]

    def _batches(self, chosen: Sequence[int]) -> list[Batch]:
        tasks = [self.data.prompts[index].task for index in chosen]
        share = {task: 1 / (len(set(tasks)) * tasks.count(task)) for task in set(tasks)}
        order = sorted(chosen, key=lambda index: (len(self._tokens[index][0]) + len(self._tokens[index][1]), index))
        batches = []
        for start in range(0, len(order), ROWS):
            rows = order[start : start + ROWS]
            mine = [self.data.prompts[index].task for index in rows]
            batches.append(
                padded(
                    [self._tokens[index] for index in rows],
                    mine,
                    [share[task] for task in mine],
                    self._model.pad,
                    self._model.device,
                )
            )
        return batches
