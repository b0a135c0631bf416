# SPDX-License-Identifier: Apache-2.0
"""Training many LoRA adapters at once: each reads its own batch, all through one pass of the base model.

A model of 30 million parameters leaves a GPU mostly idle on one batch of short texts. What comes out for each adapter is what
training it alone gives: no two share a parameter, a gradient, a clipping or a moment of the optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.quality.settings import Tuning
from benchmarks.quality.tasks import Task, answer, prompt
from vllm_merge import LoraFactors

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BETAS, EPSILON = (0.9, 0.999), 1e-8


@dataclass(frozen=True)
class Wanted:
    """An adapter to train. directions: A to start from, by module; the usual random ones without any."""

    task: Task
    seed: int
    rank: int
    alpha: float
    speed: float = 1.0
    directions: Mapping[str, Tensor] = field(default_factory=dict)


class BankLinear(nn.Module):
    """A linear layer and K LoRA factors on it: rows of x (K · batch, tokens, d_in) meet the factors of their K-th part."""

    def __init__(self, base: nn.Linear, a: Tensor, scaling: Tensor) -> None:
        """a: (K, r, d_in), zero beyond an adapter's own rank, where it stays zero; scaling: (K,)."""
        super().__init__()
        self.base = base
        self.a = nn.Parameter(a)
        self.b = nn.Parameter(a.new_zeros(len(a), base.out_features, a.shape[1]))
        self.scaling = scaling[:, None, None]

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(len(self.a), -1, x.shape[-1])
        change = rows @ self.a.mT @ (self.b * self.scaling).mT
        return self.base(x) + change.reshape(*x.shape[:-1], -1)


def train_bank(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, wanted: Sequence[Wanted], tuning: Tuning
) -> list[dict[str, LoraFactors]]:
    """Train all adapters, and give back the factors of each. The model is as it was afterwards."""
    device = model.device
    layers = _install(model, wanted)
    parameters = [part for layer in layers.values() for part in (layer.a, layer.b)]
    speeds = torch.tensor([one.speed for one in wanted], device=device)
    optimizer = _BankAdamW(parameters, speeds, tuning)
    batches = [_Batches(one, tokenizer, tuning) for one in wanted]
    model.eval()  # no dropout; the adapters' gradients flow all the same
    try:
        for step in range(tuning.steps):
            ids, targets = _together([mine.next() for mine in batches])
            rows, columns = (targets[:, 1:] >= 0).nonzero(as_tuple=True)  # here, where nothing waits for the device
            counts = torch.bincount(rows // tuning.batch, minlength=len(wanted))
            shares, labels = (1 / counts)[rows // tuning.batch], targets[rows, columns + 1]
            ids, rows, columns, shares, labels = (_sent(part, device) for part in (ids, rows, columns, shares, labels))
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state  # padding is behind
                logits = model.lm_head(hidden[rows, columns])
            losses = cross_entropy(logits.float(), labels, reduction="none")
            (losses * shares).sum().backward()
            optimizer.step(_share(step, tuning))
        return [_factors(layers, index, one) for index, one in enumerate(wanted)]
    finally:
        _remove(model, layers)


class _Batches:
    """The examples of one adapter in a new order every epoch."""

    def __init__(self, wanted: Wanted, tokenizer: PreTrainedTokenizerFast, tuning: Tuning) -> None:
        labels = [tokenizer(answer(label))["input_ids"] + [tokenizer.eos_token_id] for label in wanted.task.labels]
        texts = tokenizer([prompt(example.text) for example in wanted.task.train])["input_ids"]
        rows = [(text, labels[e.label]) for text, e in zip(texts, wanted.task.train, strict=True)]
        self._lengths = torch.tensor([len(text) + len(label) for text, label in rows])
        self._ids = torch.zeros(len(rows), int(self._lengths.max()), dtype=torch.long)
        self._targets = torch.full_like(self._ids, -1)
        for index, (text, label) in enumerate(rows):
            self._ids[index, : len(text) + len(label)] = torch.tensor(text + label)
            self._targets[index, len(text) : len(text) + len(label)] = torch.tensor(label)
        self._generator = torch.Generator().manual_seed(wanted.seed)
        self._size = tuning.batch
        self._left: list[int] = []

    def next(self) -> tuple[Tensor, Tensor]:
        """Ids (batch, tokens), padded on the right, and targets, −1 where there is none."""
        while len(self._left) < self._size:
            self._left += torch.randperm(len(self._ids), generator=self._generator).tolist()
        now, self._left = self._left[: self._size], self._left[self._size :]
        width = int(self._lengths[now].max())
        return self._ids[now, :width], self._targets[now, :width]


def _together(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Ids and targets (K · batch, tokens) of all adapters, on the CPU."""
    width = max(ids.shape[1] for ids, _ in parts)
    padded = [(pad(ids, (0, width - ids.shape[1])), pad(to, (0, width - to.shape[1]), value=-1)) for ids, to in parts]
    return torch.cat([ids for ids, _ in padded]), torch.cat([targets for _, targets in padded])


def _sent(part: Tensor, device: torch.device) -> Tensor:
    """On the device, without waiting for what it does meanwhile."""
    return part.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else part


def _share(step: int, tuning: Tuning) -> float:
    """Of the learning rate: linear warm-up, then a cosine to 0."""
    warm = max(1, round(tuning.warmup * tuning.steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, tuning.steps - warm)))


def _install(model: LlamaForCausalLM, wanted: Sequence[Wanted]) -> dict[str, BankLinear]:
    """Put a BankLinear in the place of every projection."""
    model.requires_grad_(False)
    scaling = torch.tensor([one.alpha / one.rank for one in wanted], device=model.device)
    layers: dict[str, BankLinear] = {}
    for name, module in list(model.named_modules()):
        if name.endswith(PROJECTIONS):
            a = torch.zeros(len(wanted), max(one.rank for one in wanted), module.in_features)
            for index, one in enumerate(wanted):
                a[index, : one.rank] = one.directions[name] if one.directions else _usual(one, name, module.in_features)
            layers[name] = BankLinear(module, a.to(model.device), scaling)
            _put(model, name, layers[name])
    return layers


def _usual(one: Wanted, name: str, width: int) -> Tensor:
    """PEFT's start: uniform in ±1/√d_in (Kaiming with a = √5)."""
    generator = torch.Generator().manual_seed(hash_seed(f"{one.task.name}/{one.seed}/{name}"))
    return (2 * torch.rand(one.rank, width, generator=generator) - 1) / width**0.5


def hash_seed(text: str) -> int:
    """A seed from text, the same on every machine."""
    import hashlib

    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6])


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _remove(model: LlamaForCausalLM, layers: Mapping[str, BankLinear]) -> None:
    for name, layer in layers.items():
        _put(model, name, layer.base)


def _factors(layers: Mapping[str, BankLinear], index: int, one: Wanted) -> dict[str, LoraFactors]:
    return {
        name: LoraFactors(
            layer.a[index, : one.rank].detach().cpu().clone(),
            layer.b[index, :, : one.rank].detach().cpu().clone(),
            one.alpha / one.rank,
        )
        for name, layer in layers.items()
    }


class _BankAdamW:
    """AdamW (arXiv:1711.05101) with a learning rate and a clipping of the gradient to norm 1 for each adapter."""

    def __init__(self, parameters: Sequence[nn.Parameter], speeds: Tensor, tuning: Tuning) -> None:
        self._parameters, self._speeds, self._tuning = parameters, speeds, tuning
        self._first = [torch.zeros_like(parameter) for parameter in parameters]
        self._second = [torch.zeros_like(parameter) for parameter in parameters]
        self._steps = 0

    @torch.no_grad()
    def step(self, share: float) -> None:
        self._steps += 1
        gradients = [parameter.grad for parameter in self._parameters]
        square = torch.stack([gradient.square().sum((1, 2)) for gradient in gradients]).sum(0)
        clip = (1.0 / (square.sqrt() + 1e-6)).clamp_max(1.0)[:, None, None]
        gradients = torch._foreach_mul(gradients, [clip] * len(gradients))
        torch._foreach_lerp_(self._first, gradients, 1 - BETAS[0])
        torch._foreach_mul_(self._second, BETAS[1])
        torch._foreach_addcmul_(self._second, gradients, gradients, 1 - BETAS[1])
        rate = (share * self._tuning.learning_rate * self._speeds)[:, None, None]
        one, two = 1 - BETAS[0] ** self._steps, 1 - BETAS[1] ** self._steps
        below = torch._foreach_sqrt(torch._foreach_div(self._second, two))
        torch._foreach_add_(below, EPSILON)
        change = torch._foreach_div(torch._foreach_div(self._first, one), below)
        torch._foreach_add_(change, self._parameters, alpha=self._tuning.weight_decay)
        torch._foreach_mul_(change, [rate] * len(change))
        torch._foreach_sub_(self._parameters, change)
        for parameter in self._parameters:
            parameter.grad = None
