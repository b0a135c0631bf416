# SPDX-License-Identifier: Apache-2.0
"""Which label a model finds likeliest, for many examples of many tasks at once.

An example is one sequence: its prompt, then the tokens of every label side by side, each seeing the prompt and itself alone.
One pass scores all labels; log p(label, end | prompt) is summed over the label's tokens. Examples of like length share a pass,
whatever their tasks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.quality.forward import hidden_states
from benchmarks.quality.tasks import Example, Words, answer

Bits = NDArray[np.bool_]
ALIGNED = 8  # tokens of a sequence are a multiple: attention kernels copy masks of other widths


@dataclass(frozen=True)
class Asked:
    """Examples with the labels to choose from. words: of their task; prefix: solved examples before each prompt; right: the
    index in `labels` of each right one, if not its own."""

    examples: Sequence[Example]
    labels: Sequence[str]
    words: Words
    prefix: str = ""
    right: Sequence[int] | None = None

    def prompts(self) -> list[str]:
        return [self.prefix + self.words.prompt(example.text) for example in self.examples]

    def rights(self) -> NDArray[np.int64]:
        return np.array([example.label for example in self.examples] if self.right is None else self.right)


@dataclass(frozen=True)
class _Labels:
    """All labels side by side. ids, offsets, blocks: of each token, with its place in its label and its label + 1;
    sources: where the prediction of each target is, 0 for the prompt's last token; targets and owners: one for each."""

    ids: list[int]
    offsets: list[int]
    blocks: list[int]
    sources: list[int]
    targets: list[int]
    owners: list[int]

    @classmethod
    def of(cls, labels: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> _Labels:
        found = cls([], [], [], [], [], [])
        for index, label in enumerate(labels):
            tokens = tokenizer(answer(label))["input_ids"]
            start = len(found.ids) + 1
            found.sources.extend([0, *range(start, start + len(tokens))])
            found.targets.extend([*tokens, tokenizer.eos_token_id])
            found.owners.extend([index] * (len(tokens) + 1))
            found.ids.extend(tokens)
            found.offsets.extend(range(len(tokens)))
            found.blocks.extend([index + 1] * len(tokens))
        return found


@dataclass(frozen=True)
class _Sequence:
    """One example. slot: where the score of its first label goes."""

    text: list[int]
    labels: _Labels
    slot: int

    def __len__(self) -> int:
        return len(self.text) + len(self.labels.ids)


@dataclass(frozen=True)
class _Batch:
    """Sequences padded on the right. ids, places: (rows, tokens); mask: what each token adds to the attention to each other;
    picked: the tokens, counted through, whose predictions are read; sources (into picked), targets, slots: by target."""

    ids: Tensor
    places: Tensor
    mask: Tensor
    picked: Tensor
    sources: Tensor
    targets: Tensor
    slots: Tensor

    @classmethod
    def of(cls, rows: Sequence[_Sequence], device: torch.device) -> _Batch:
        width = -(-max(map(len, rows)) // ALIGNED) * ALIGNED
        ids, places = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(2))
        blocks = torch.full_like(ids, -1)
        picked, sources, targets, slots = [], [], [], []
        for index, row in enumerate(rows):
            labels, size = row.labels, len(row.text)
            ids[index, : len(row)] = torch.tensor(row.text + labels.ids)
            places[index, : len(row)] = torch.tensor([*range(size), *(size + offset for offset in labels.offsets)])
            blocks[index, : len(row)] = torch.tensor([0] * size + labels.blocks)
            sources += [len(picked) + source for source in labels.sources]
            picked += range(index * width + size - 1, index * width + len(row))
            targets += labels.targets
            slots += [row.slot + owner for owner in labels.owners]
        blocks = blocks.to(device)
        sees = (blocks[:, None, :] == 0) | (blocks[:, None, :] == blocks[:, :, None])
        sees &= torch.ones(width, width, dtype=torch.bool, device=device).tril()
        mask = torch.zeros(sees.shape, device=device).masked_fill_(~sees, -torch.inf)[:, None]
        lists = (torch.tensor(values).to(device) for values in (picked, sources, targets, slots))
        return cls(ids.to(device), places.to(device), mask, *lists)


class Questions:
    """Examples of one task or several, packed for a device."""

    def __init__(
        self, asked: Sequence[Asked], tokenizer: PreTrainedTokenizerFast, device: torch.device, tokens_at_once: int
    ) -> None:
        self._device = device
        self._right = [one.rights() for one in asked]
        self._counts = [len(one.labels) for one in asked]
        sequences: list[_Sequence] = []
        slots = 0
        for one in asked:
            labels = _Labels.of(one.labels, tokenizer)
            for text in tokenizer(one.prompts())["input_ids"]:
                sequences.append(_Sequence(text, labels, slots))
                slots += len(one.labels)
        self._slots = slots
        sequences.sort(key=len)
        self._batches: list[_Batch] = []
        while sequences:
            size = max(1, tokens_at_once // (len(sequences[-1]) + ALIGNED - 1))
            self._batches.append(_Batch.of(sequences[-size:], device))
            del sequences[-size:]

    @torch.inference_mode()
    def scores(self, model: LlamaForCausalLM) -> list[NDArray[np.float32]]:
        """log p of every label, (examples, labels), for each of what is asked."""
        found = torch.zeros(self._slots, device=self._device)
        with quick():
            for batch in self._batches:
                hidden = hidden_states(model, batch.ids, batch.places, batch.mask)
                logits = model.lm_head(hidden[batch.picked]).float()
                each = logits[batch.sources, batch.targets] - logits.logsumexp(-1)[batch.sources]
                found.index_add_(0, batch.slots, each)
        sizes = [len(right) * count for right, count in zip(self._right, self._counts, strict=True)]
        parts = zip(found.cpu().split(sizes), self._counts, strict=True)
        return [part.view(-1, count).numpy() for part, count in parts]

    def correct(self, model: LlamaForCausalLM) -> list[Bits]:
        """Whether the likeliest label is the right one, (examples,), for each of what is asked."""
        pairs = zip(self.scores(model), self._right, strict=True)
        return [np.asarray(scores.argmax(1) == right) for scores, right in pairs]

    def places(self, model: LlamaForCausalLM) -> list[NDArray[np.int64]]:
        """How many labels are likelier than the right one, (examples,), for each of what is asked."""
        pairs = zip(self.scores(model), self._right, strict=True)
        return [np.asarray((scores > scores[np.arange(len(scores)), right][:, None]).sum(1)) for scores, right in pairs]


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
        for name in deltas.keys() - self._own.keys():
            self._own[name] = self._model.get_submodule(name).weight.detach().clone()
        if self._own:
            weights = {name: self._model.get_submodule(name).weight for name in self._own}
            torch._foreach_copy_(list(weights.values()), list(self._own.values()))
        if deltas:
            changes = [delta.to(weights[name]) for name, delta in deltas.items()]
            torch._foreach_add_([weights[name] for name in deltas], changes, alpha=scale)


def joint_norm(deltas: Iterable[Tensor]) -> float:
    """‖ΔW‖_F over all of them."""
    return float(torch.stack([delta.double().square().sum() for delta in deltas]).sum().sqrt())
