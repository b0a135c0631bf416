# SPDX-License-Identifier: Apache-2.0
"""The base model, in transformers, and texts as it reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vllm_merge.errors import MergeError, UserInputError
from vllm_merge.training.inputs import BATCH, Batch


class BaseModel:
    """A causal language model and its tokenizer; float32 on a CPU, its own dtype elsewhere."""

    def __init__(self, path: str, device: str) -> None:
        """Raises MergeError where transformers is not installed, UserInputError where it cannot load the model."""
        try:
            from transformers import AutoModelForCausalLM, AutoTokenizer
            from transformers.utils import logging
        except ImportError:
            raise MergeError(
                "transformers is not installed, which runs the base model; install it with `pip install 'vllm-merge[tune]'`"
            ) from None
        logging.disable_progress_bar()
        dtype = torch.float32 if torch.device(device).type == "cpu" else "auto"
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(path)
            self.model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).eval()
        except (OSError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise UserInputError(f"{path}: transformers cannot load it: {reason}") from None

    def batches(self, texts: Sequence[str], max_tokens: int) -> list[Batch]:
        """The texts as ids, cut to max_tokens, padded on the right; texts of like length together."""
        ids = [self.tokenizer(text, truncation=True, max_length=max_tokens)["input_ids"] for text in texts]
        ids = sorted((row for row in ids if row), key=len)
        return [self._padded(ids[start : start + BATCH]) for start in range(0, len(ids), BATCH)]

    def _padded(self, rows: Sequence[Sequence[int]]) -> Batch:
        width = max(map(len, rows))
        ids = torch.zeros(len(rows), width, dtype=torch.long)  # what stands behind a text changes nothing before it
        mask = torch.zeros_like(ids)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = torch.tensor(row)
            mask[index, : len(row)] = 1
        return {"input_ids": ids.to(self.model.device), "attention_mask": mask.to(self.model.device)}
