# SPDX-License-Identifier: Apache-2.0
"""Greedy answers of a transformers model, and how many of them are right."""

from collections.abc import Sequence

import torch
from tasks import Example
from transformers import PreTrainedModel, PreTrainedTokenizerBase

LONGEST_ANSWER = 20  # tokens


@torch.inference_mode()
def answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[str]:
    """The greedy answer to each prompt, without the newline that ends it."""
    batch = tokenizer(list(prompts), return_tensors="pt", padding=True).to(model.device)
    model.eval()
    tokens = model.generate(**batch, max_new_tokens=LONGEST_ANSWER, do_sample=False)
    given: list[str] = tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return given


def accuracy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> float:
    """The share of examples that the model answers exactly right, in [0, 1]."""
    given = answers(model, tokenizer, [example.prompt for example in examples])
    return sum(text == example.answer for text, example in zip(given, examples, strict=True)) / len(examples)
