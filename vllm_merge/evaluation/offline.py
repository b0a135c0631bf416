# SPDX-License-Identifier: Apache-2.0
"""Answers from a model in this process, through transformers, with LoRA factors added to its layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vllm_merge.adapters.factors import LoraFactors
from vllm_merge.errors import MergeError, UserInputError

BATCH = 16  # prompts at once


class OfflineModel:
    """A causal language model of transformers. chat: prompts are messages of a user, by the tokenizer's template."""

    def __init__(self, path: str, device: str, max_tokens: int, *, chat: bool = False) -> None:
        """Raises MergeError where transformers is not installed, UserInputError where the model cannot be loaded."""
        try:
            from transformers import AutoModelForCausalLM, AutoTokenizer
            from transformers.utils import logging
        except ImportError:
            raise MergeError(
                "transformers is not installed, which runs models without a server; "
                "install it with `pip install transformers`, or give --server URL"
            ) from None
        logging.disable_progress_bar()
        dtype = torch.float32 if torch.device(device).type == "cpu" else "auto"
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(path, padding_side="left")
            self._model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).eval()
        except (OSError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise UserInputError(f"base model {path}: transformers cannot load it: {reason}") from None
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        if chat and self._tokenizer.chat_template is None:
            raise UserInputError(f"--chat: the tokenizer of {path} has no chat template; leave the option out")
        self._max_tokens, self._chat = max_tokens, chat

    @torch.inference_mode()
    def answers(
        self, factors: Mapping[str, LoraFactors], prompts: Sequence[str], progress: Callable[[int], None]
    ) -> list[str]:
        """The greedy answer to each prompt with these factors; progress(answers so far)."""
        found: list[str] = []
        with self._with(factors):
            for start in range(0, len(prompts), BATCH):
                texts = [self._text(prompt) for prompt in prompts[start : start + BATCH]]
                batch = self._tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=not self._chat)
                batch = batch.to(self._model.device)
                tokens = self._model.generate(
                    **batch,
                    max_new_tokens=self._max_tokens,
                    do_sample=False,
                    pad_token_id=self._tokenizer.pad_token_id,
                )
                new = tokens[:, batch["input_ids"].shape[1] :]
                found += self._tokenizer.batch_decode(new, skip_special_tokens=True)
                progress(len(found))
        return found

    def _text(self, prompt: str) -> str:
        if not self._chat:
            return prompt
        messages = [{"role": "user", "content": prompt}]
        return str(self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))

    @contextmanager
    def _with(self, factors: Mapping[str, LoraFactors]) -> Iterator[None]:
        """Add ΔW x to what each module gives, while the block runs; the weights are never touched."""
        handles = []
        try:
            for name, pair in factors.items():
                try:
                    module = self._model.get_submodule(name)
                except AttributeError:
                    raise UserInputError(
                        f"the model has no module {name}, which the adapter changes; is it the adapter's base model?"
                    ) from None
                handles.append(module.register_forward_hook(_added(pair, self._model.device, self._model.dtype)))
            yield
        finally:
            for handle in handles:
                handle.remove()


def _added(pair: LoraFactors, device: torch.device, dtype: torch.dtype) -> Callable[[Any, Any, Tensor], Tensor]:
    folded = pair.folded()
    a, b = folded.A.to(device, dtype).mT, folded.B.to(device, dtype).mT

    def linear(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + inputs[0].to(dtype) @ a @ b

    def embedding(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        scale = getattr(module, "embed_scale", 1.0)  # some embeddings multiply what they look up
        return output + torch.nn.functional.embedding(inputs[0], a) @ b * scale

    return embedding if pair.embedding else linear
