# SPDX-License-Identifier: Apache-2.0
"""Training many LoRA adapters at once: each reads its own batch, all through one pass of the base model.

A model of 30 million parameters leaves a GPU mostly idle on one batch of short texts. What comes out for each adapter is what
training it alone gives: no two share a parameter, a gradient, a clipping or a moment of the optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from benchmarks.quality.settings import Tuning
from benchmarks.quality.tasks import Task, answer
from vllm_merge import LoraFactors

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BETAS, EPSILON = (0.9, 0.999), 1e-8
POOL = 8  # batches


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
        """a: (K, r, d_in), zero beyond an adapter's own rank, where it stays zero; scaling: (K,), of B in the product."""
        super().__init__()
        self.base = base
        self.a = nn.Parameter(a.to(base.weight.dtype))
        self.b = nn.Parameter(self.a.new_zeros(len(a), base.out_features, a.shape[1]))
        self.start, self.scaling = a, scaling[:, None, None]

    def forward(self, x: Tensor) -> Tensor:
        own = self.base(x)
        rows = x.reshape(len(self.a), -1, x.shape[-1])
        changed = torch.baddbmm(own.view(len(self.a), -1, own.shape[-1]), rows @ self.a.mT, self.b.mT)
        return changed.view_as(own)


def train_bank(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, wanted: Sequence[Wanted], tuning: Tuning
) -> list[dict[str, LoraFactors]]:
    """Train all adapters, and give back the factors of each. The model stays as it is.

    On a GPU a copy of the model computes in bfloat16, in which its weights are exact; the factors themselves, their moments
    and the loss are float32.
    """
    device = model.device
    frozen = _copy(model, torch.bfloat16 if device.type == "cuda" else torch.float32)
    layers = _install(frozen, wanted)
    speeds = torch.tensor([one.speed for one in wanted], device=device)
    optimizer = _BankAdamW(list(layers.values()), speeds, tuning)
    batches = [_Batches(one, tokenizer, tuning) for one in wanted]
    for step in range(tuning.steps):
        ids, targets = _together([mine.next() for mine in batches])
        rows, columns = (targets[:, 1:] >= 0).nonzero(as_tuple=True)  # here, where nothing waits for the device
        counts = torch.bincount(rows // tuning.batch, minlength=len(wanted))
        shares, labels = (1 / counts)[rows // tuning.batch], targets[rows, columns + 1]
        ids, rows, columns, shares, labels = (_sent(part, device) for part in (ids, rows, columns, shares, labels))
        hidden = frozen.model(input_ids=ids, use_cache=False).last_hidden_state  # padding is behind
        logits = frozen.lm_head(hidden[rows, columns])
        losses = cross_entropy(logits.float(), labels, reduction="none")
        (losses * shares).sum().backward()
        optimizer.step(_share(step, tuning))
    factors = optimizer.factors()
    return [_factors(dict(zip(layers, factors, strict=True)), index, one) for index, one in enumerate(wanted)]


def _copy(model: LlamaForCausalLM, dtype: torch.dtype) -> LlamaForCausalLM:
    """A frozen copy without dropout whose norms are one kernel each; gradients of what is put into it flow all the same."""
    found: LlamaForCausalLM = deepcopy(model).to(dtype).requires_grad_(False).eval()
    for name, module in list(found.named_modules()):
        if isinstance(module, LlamaRMSNorm):
            norm = nn.RMSNorm(len(module.weight), module.variance_epsilon, device=module.weight.device, dtype=dtype)
            norm.load_state_dict(module.state_dict())
            _put(found, name, norm.requires_grad_(False))
    return found


class _Batches:
    """The examples of one adapter in a new order every epoch; of POOL batches in a row, texts of like length share one.

    All adapters take the longest of a pool at the same time, so that little of a pass is padding.
    """

    def __init__(self, wanted: Wanted, tokenizer: PreTrainedTokenizerFast, tuning: Tuning) -> None:
        labels = [tokenizer(answer(label))["input_ids"] + [tokenizer.eos_token_id] for label in wanted.task.labels]
        texts = tokenizer([wanted.task.words.prompt(example.text) for example in wanted.task.train])["input_ids"]
        rows = [(text, labels[e.label]) for text, e in zip(texts, wanted.task.train, strict=True)]
        self._lengths = torch.tensor([len(text) + len(label) for text, label in rows])
        self._ids = torch.zeros(len(rows), int(self._lengths.max()), dtype=torch.long)
        self._targets = torch.full_like(self._ids, -1)
        for index, (text, label) in enumerate(rows):
            self._ids[index, : len(text) + len(label)] = torch.tensor(text + label)
            self._targets[index, len(text) : len(text) + len(label)] = torch.tensor(label)
        self._generator = torch.Generator().manual_seed(wanted.seed)
        self._turns = torch.Generator().manual_seed(0)  # the same for all adapters
        self._size = tuning.batch
        self._left: list[int] = []
        self._pool: list[Tensor] = []

    def next(self) -> tuple[Tensor, Tensor]:
        """Ids (batch, tokens), padded on the right, and targets, −1 where there is none."""
        if not self._pool:
            self._pool = self._next_pool()
        now = self._pool.pop()
        width = int(self._lengths[now].max())
        return self._ids[now, :width], self._targets[now, :width]

    def _next_pool(self) -> list[Tensor]:
        count = POOL * self._size
        while len(self._left) < count:
            self._left += torch.randperm(len(self._ids), generator=self._generator).tolist()
        chosen, self._left = torch.tensor(self._left[:count]), self._left[count:]
        batches = chosen[self._lengths[chosen].argsort(stable=True)].split(self._size)
        return [batches[place] for place in torch.randperm(POOL, generator=self._turns).tolist()]


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


def _factors(layers: Mapping[str, tuple[Tensor, Tensor]], index: int, one: Wanted) -> dict[str, LoraFactors]:
    return {
        name: LoraFactors(
            a[index, : one.rank].cpu().clone(), b[index, :, : one.rank].cpu().clone(), one.alpha / one.rank
        )
        for name, (a, b) in layers.items()
    }


class _BankAdamW:
    """AdamW (arXiv:1711.05101) with a learning rate and a clipping of the gradient to norm 1 for each adapter.

    It holds A and B in float32; what the layers compute with is A, and B times its scaling, in their dtype.
    """

    def __init__(self, layers: Sequence[BankLinear], speeds: Tensor, tuning: Tuning) -> None:
        self._speeds, self._tuning = speeds, tuning
        self._working = [part for layer in layers for part in (layer.a, layer.b)]
        self._values = [
            part for layer in layers for part in (layer.start, torch.zeros_like(layer.b, dtype=torch.float32))
        ]
        self._scales = [part for layer in layers for part in (torch.ones_like(layer.scaling), layer.scaling)]
        self._first, self._second, self._gradients = (
            [torch.zeros_like(value) for value in self._values] for _ in range(3)
        )
        self._steps = 0

    @torch.no_grad()
    def step(self, share: float) -> None:
        self._steps += 1
        torch._foreach_copy_(self._gradients, [working.grad for working in self._working])
        torch._foreach_mul_(self._gradients, self._scales)
        square = torch.stack([gradient.square().sum((1, 2)) for gradient in self._gradients]).sum(0)
        clip = (1.0 / (square.sqrt() + 1e-6)).clamp_max(1.0)[:, None, None]
        torch._foreach_mul_(self._gradients, [clip] * len(self._gradients))
        torch._foreach_lerp_(self._first, self._gradients, 1 - BETAS[0])
        torch._foreach_mul_(self._second, BETAS[1])
        torch._foreach_addcmul_(self._second, self._gradients, self._gradients, 1 - BETAS[1])
        rate = (share * self._tuning.learning_rate * self._speeds)[:, None, None]
        one, two = 1 - BETAS[0] ** self._steps, 1 - BETAS[1] ** self._steps
        below = torch._foreach_sqrt(torch._foreach_div(self._second, two))
        torch._foreach_add_(below, EPSILON)
        change = torch._foreach_div(torch._foreach_div(self._first, one), below)
        torch._foreach_add_(change, self._values, alpha=self._tuning.weight_decay)
        torch._foreach_mul_(change, [rate] * len(change))
        torch._foreach_sub_(self._values, change)
        torch._foreach_copy_(self._working, torch._foreach_mul(self._values, self._scales))
        for working in self._working:
            working.grad = None

    def factors(self) -> list[tuple[Tensor, Tensor]]:
        """A and B of each layer, float32."""
        return list(zip(self._values[::2], self._values[1::2], strict=True))
