# SPDX-License-Identifier: Apache-2.0
"""What is made small: a value of every row of a batch, from the model as it is attached now.

entropy: Shannon entropy of the answer's tokens (AdaMerging, arXiv:2310.02575); it does not ask whether they are right.
loss: cross-entropy of the right answer's tokens. accuracy: 1 where greedy decoding misses the right answer, else 0.
A goal adds terms up, each over prompts of its own: with a safety set L_safety + α L_expert (MergeAlign, arXiv:2406.14563).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from vllm_merge.tuning.batches import Batch, Encoded, padded
from vllm_merge.tuning.model import TuningModel


class Objective(Protocol):
    """A value of each row, the smaller the better."""

    @property
    def name(self) -> str: ...

    @property
    def needs_answers(self) -> bool: ...

    @property
    def differentiable(self) -> bool: ...

    def rows(self, model: TuningModel, batch: Batch) -> Tensor:
        """(rows,) float32."""
        ...


def _predictions(model: TuningModel, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (rows, length − 1, vocabulary) float32 or wider, the tokens they foretell, and which are of an answer."""
    logits = model.logits(batch.ids, batch.there)[:, :-1]
    return logits if logits.dtype == torch.float64 else logits.float(), batch.ids[:, 1:], batch.answered[:, 1:]


def _mean(values: Tensor, where: Tensor) -> Tensor:
    """The mean of each row over the places that count."""
    return (values * where).sum(1) / where.sum(1).clamp_min(1)


@dataclass(frozen=True)
class Entropy:
    """Of the answer's tokens. tokens: of the answers that the model as attached gives itself, where a batch has none."""

    tokens: int
    name: str = "entropy"
    needs_answers: bool = False
    differentiable: bool = True

    def rows(self, model: TuningModel, batch: Batch) -> Tensor:
        if not bool(batch.answered.any()):
            batch = self.answered(model, batch)
        logits, _, where = _predictions(model, batch)
        logs = logits.log_softmax(-1)
        return _mean(-(logs.exp() * logs).sum(-1), where)

    def answered(self, model: TuningModel, batch: Batch) -> Batch:
        """The batch with the model's own greedy answers, none of which has gradients."""
        prompts = batch.prompts()
        answers = model.greedy(prompts, self.tokens)
        made = padded(
            list(zip(prompts, answers, strict=True)), batch.tasks, [1.0] * len(prompts), model.pad, model.device
        )
        return Batch(made.ids, made.there, made.answered, batch.tasks, batch.weights)


@dataclass(frozen=True)
class Loss:
    """Cross-entropy of the right answer's tokens, in nats a token."""

    name: str = "loss"
    needs_answers: bool = True
    differentiable: bool = True

    def rows(self, model: TuningModel, batch: Batch) -> Tensor:
        logits, following, where = _predictions(model, batch)
        return _mean(cross_entropy(logits.mT, following, reduction="none"), where)


@dataclass(frozen=True)
class Accuracy:
    """Whether a greedy answer is not the right one: some token of it is not the likeliest after the right ones before."""

    name: str = "accuracy"
    needs_answers: bool = True
    differentiable: bool = False

    def rows(self, model: TuningModel, batch: Batch) -> Tensor:
        logits, following, where = _predictions(model, batch)
        return ((logits.argmax(-1) != following) & where).any(1).float()


@dataclass(frozen=True)
class Term:
    """weight × the mean of an objective over prompts, every task of which counts alike."""

    weight: float
    data: Encoded
    objective: Objective


@dataclass(frozen=True)
class Goal:
    """The sum of its terms."""

    terms: Sequence[Term]

    @property
    def differentiable(self) -> bool:
        """Whether it has gradients."""
        return all(term.objective.differentiable for term in self.terms)

    @torch.no_grad()
    def value(self, model: TuningModel) -> float:
        """Over all prompts, for the model as it is attached now. NaN where it cannot be had."""
        return self._over(model, [term.data.all() for term in self.terms])

    def subsets(self, of_each: int) -> int:
        """How many subsets of `of_each` prompts of each task there are, so that every prompt is in one."""
        return max(term.data.subsets(of_each) for term in self.terms)

    @torch.no_grad()
    def value_on(self, model: TuningModel, number: int, of_each: int, seed: int) -> float:
        """The same over one of the subsets, which are drawn from the seed."""
        return self._over(model, [term.data.subset(number, of_each, seed) for term in self.terms])

    def _over(self, model: TuningModel, batches: Sequence[Sequence[Batch]]) -> float:
        """Over these batches of each term."""
        return sum(
            term.weight * float(term.objective.rows(model, batch) @ batch.weights)
            for term, mine in zip(self.terms, batches, strict=True)
            for batch in mine
        )

    def backward(self, model: TuningModel, of_each: int, seed: int, step: int) -> float:
        """Over `of_each` prompts of each task, drawn by seed and step; adds to the gradients of what the branches are of."""
        total = 0.0
        for term in self.terms:
            for batch in term.data.drawn(of_each, seed, step):
                value = term.weight * (term.objective.rows(model, batch) @ batch.weights)
                total += value.item()
                value.backward(retain_graph=True)  # type: ignore[no-untyped-call]  # batches share what the branches are of
        return total
