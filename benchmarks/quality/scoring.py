# SPDX-License-Identifier: Apache-2.0
"""Which label a model finds likeliest, for many examples at once.

An example is one sequence: its prompt, then the tokens of every label side by side, each seeing the prompt and itself alone.
One pass scores all labels; log p(label, end | prompt) is summed over the label's tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.quality.tasks import Example, answer, prompt

Bits = NDArray[np.bool_]


@dataclass(frozen=True)
class _Labels:
    """All labels side by side. ids, offsets: (tokens,), a token and its place in its label; sees: (tokens, tokens);
    sources: where the prediction of each target is, 0 for the prompt's last token; targets and owner: (targets,)."""

    ids: Tensor
    offsets: Tensor
    sees: Tensor
    sources: Tensor
    targets: Tensor
    owner: Tensor
    count: int

    @classmethod
    def of(cls, labels: Sequence[str], tokenizer: PreTrainedTokenizerFast, device: torch.device) -> _Labels:
        ids, offsets, block, sources, targets, owner = [], [], [], [], [], []
        for index, label in enumerate(labels):
            tokens = tokenizer(answer(label))["input_ids"]
            start = len(ids) + 1
            sources += [0, *range(start, start + len(tokens))]
            targets += [*tokens, tokenizer.eos_token_id]
            owner += [index] * (len(tokens) + 1)
            ids += tokens
            offsets += range(len(tokens))
            block += [index] * len(tokens)
        of = torch.tensor(block)
        sees = (of[:, None] == of[None, :]) & torch.ones(len(of), len(of)).tril().bool()
        numbers = (torch.tensor(values).to(device) for values in (ids, offsets))
        return cls(
            *numbers, sees.to(device), *(torch.tensor(v).to(device) for v in (sources, targets, owner)), len(labels)
        )


class Questions:
    """Examples of a task with the labels to choose from, packed for a device."""

    def __init__(
        self,
        examples: Sequence[Example],
        labels: Sequence[str],
        tokenizer: PreTrainedTokenizerFast,
        device: torch.device,
        tokens_at_once: int,
        *,
        prefix: str = "",
        right: Sequence[int] | None = None,
    ) -> None:
        """prefix: solved examples before each prompt. right: the index in `labels` of each right one, if not its own."""
        self._labels = _Labels.of(labels, tokenizer, device)
        texts = tokenizer([prefix + prompt(example.text) for example in examples])["input_ids"]
        self.right = np.array([example.label for example in examples] if right is None else right)
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        self._batches: list[tuple[list[int], Tensor, Tensor]] = []
        while order:
            width = len(texts[order[-1]])
            size = max(1, tokens_at_once // (width + len(self._labels.ids)))
            rows, order = order[-size:], order[:-size]
            ids = torch.zeros(len(rows), width, dtype=torch.long)
            for place, row in enumerate(rows):
                ids[place, width - len(texts[row]) :] = torch.tensor(texts[row])
            padding = torch.tensor([width - len(texts[row]) for row in rows])
            self._batches.append((rows, ids.to(device), padding.to(device)))

    @torch.inference_mode()
    def scores(self, model: LlamaForCausalLM) -> NDArray[np.float32]:
        """log p of every label, (examples, labels)."""
        with quick():
            parts = [self._score(model, ids, padding) for _, ids, padding in self._batches]
        found = np.zeros((len(self.right), self._labels.count), dtype=np.float32)
        for (rows, _, _), part in zip(self._batches, parts, strict=True):
            found[rows] = part.cpu().numpy()
        return found

    def correct(self, model: LlamaForCausalLM) -> Bits:
        """Whether the likeliest label is the right one, (examples,)."""
        return np.asarray(self.scores(model).argmax(1) == self.right)

    def places(self, model: LlamaForCausalLM) -> NDArray[np.int64]:
        """How many labels are likelier than the right one, (examples,)."""
        scores = self.scores(model)
        return np.asarray((scores > scores[np.arange(len(scores)), self.right][:, None]).sum(1))

    def _score(self, model: LlamaForCausalLM, ids: Tensor, padding: Tensor) -> Tensor:
        labels, (size, width) = self._labels, ids.shape
        total = width + len(labels.ids)
        columns = torch.arange(total, device=ids.device)
        real = columns[None, :] >= padding[:, None]
        sees = torch.ones(total, total, device=ids.device).tril().bool()
        sees[width:, width:] = labels.sees
        mask = (sees[None] & real[:, None, :]) | torch.eye(total, device=ids.device).bool()
        places = torch.cat(
            [(columns[:width] - padding[:, None]).clamp_min(0), width - padding[:, None] + labels.offsets], 1
        )
        tokens = torch.cat([ids, labels.ids.expand(size, -1)], 1)
        hidden = model.model(
            input_ids=tokens, attention_mask=mask[:, None], position_ids=places, use_cache=False
        ).last_hidden_state
        logits = model.lm_head(hidden[:, width - 1 :]).float()
        each = logits[:, labels.sources, labels.targets] - logits.logsumexp(-1)[:, labels.sources]
        return each.new_zeros(size, labels.count).index_add(1, labels.owner, each)


@contextmanager
def quick() -> Iterator[None]:
    """Matrix products in TF32 where a GPU has it, for forward passes; merges are made in full float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class Weights:
    """The model's own weights, and those with a change added."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        self._model = model
        self._own: dict[str, Tensor] = {}

    @torch.no_grad()
    def set(self, deltas: Mapping[str, Tensor], scale: float = 1.0) -> None:
        """W = W0 + scale · ΔW at these modules, W0 at all others. deltas: {module: (d_out, d_in)}."""
        for name in self._own.keys() - deltas.keys():
            self._model.get_submodule(name).weight.copy_(self._own.pop(name))
        for name, delta in deltas.items():
            weight = self._model.get_submodule(name).weight
            if name not in self._own:
                self._own[name] = weight.detach().clone()
            torch.add(self._own[name], delta.to(weight), alpha=scale, out=weight)
