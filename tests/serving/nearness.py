# SPDX-License-Identifier: Apache-2.0
"""How far answers are from others to the same prompts."""

import torch

HALF = 0.05  # nats: what roundings of bfloat16 may make; the merge in the worker and the one here need not have the same bits

# The tokens of prompts and answers, and their log-probabilities from the second on.
Answers = tuple[list[list[int]], list[torch.Tensor]]


def distance(some: Answers, others: Answers) -> float:
    """Largest |Δ log p| up to the first token that differs."""
    largest = 0.0
    for ids, theirs, a, b in zip(some[0], others[0], some[1], others[1], strict=True):
        pairs = list(zip(ids, theirs, strict=True))
        same = next((i for i, (mine, its) in enumerate(pairs) if mine != its), len(pairs))
        largest = max(largest, float((a[: same - 1] - b[: same - 1]).abs().max()))
    return largest
