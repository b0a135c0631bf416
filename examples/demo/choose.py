# SPDX-License-Identifier: Apache-2.0
"""Choose λ of a merge on validation prompts, with the same small budget for every method.

λ multiplies the whole result, so one merge serves all its values. The right scale differs by method (a mean needs a larger
one than a sum), and so the grid is laid around the λ at which the result is as large as the plain sum of the adapters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from tasks import Example
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vllm_merge import Adapter, MergedAdapter

GRID = (0.63, 0.8, 1.0, 1.26, 1.6, 2.0, 2.5, 3.2)  # a step is a quarter more


@torch.inference_mode()
def right(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> list[bool]:
    """Which examples a greedy answer gets right, by one forward pass: each token of the answer must be the likeliest
    after the right ones before it, the newline that ends the answer included."""
    prompts = [tokenizer(example.prompt)["input_ids"] for example in examples]
    endings = [tokenizer(f"{e.answer}\n", add_special_tokens=False)["input_ids"] for e in examples]
    width = max(len(prompt) + len(ending) for prompt, ending in zip(prompts, endings, strict=True))
    ids = torch.full((len(examples), width), tokenizer.pad_token_id)
    answered = torch.zeros(ids.shape, dtype=torch.bool)
    for row, (prompt, ending) in enumerate(zip(prompts, endings, strict=True)):
        ids[row, : len(prompt) + len(ending)] = torch.tensor(prompt + ending)
        answered[row, len(prompt) : len(prompt) + len(ending)] = True
    likeliest = model(input_ids=ids[:, :-1]).logits.argmax(-1)  # causal: padding behind changes nothing before it
    wrong = (likeliest != ids[:, 1:]) & answered[:, 1:]
    found: list[bool] = (~wrong.any(1)).tolist()
    return found


def sum_norm(adapters: Sequence[Adapter]) -> float:
    """‖Σ ΔW_i‖_F over all modules."""
    modules = {module for adapter in adapters for module in adapter.factors}
    sums = [sum(a.factors[module].delta() for a in adapters if module in a.factors) for module in modules]
    return float(sum(torch.as_tensor(total).square().sum() for total in sums) ** 0.5)


def norm(merged: MergedAdapter) -> float:
    """‖ΔW‖_F over all modules."""
    return float(sum(merged.delta(module).square().sum() for module in merged.factors) ** 0.5)


@dataclass(frozen=True)
class Choice:
    """The best λ, and the validation accuracy of every λ that was tried."""

    lam: float
    tried: Mapping[float, float]


def choose(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    base: Mapping[str, Tensor],
    merged: MergedAdapter,
    around: float,
    prompts: Sequence[Example],
) -> Choice:
    """The λ of the grid around `around` that gets most prompts right; of equals, the one nearest to `around`.

    merged: with λ = 1. base: the model's own weights, which it has again afterwards.
    """
    tried: dict[float, float] = {}
    deltas = {f"{module}.weight": merged.delta(module) for module in merged.factors}
    for factor in sorted(GRID, key=lambda factor: abs(factor - 1)):
        lam = float(f"{around * factor:.3g}")
        model.load_state_dict({k: v + lam * deltas[k] if k in deltas else v for k, v in base.items()})
        tried[lam] = sum(right(model, tokenizer, prompts)) / len(prompts)
    model.load_state_dict(dict(base))
    return Choice(max(tried, key=tried.__getitem__), tried)
