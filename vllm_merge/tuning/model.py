# SPDX-License-Identifier: Apache-2.0
"""The base model in this process, frozen, with branches beside its linear layers that a learner may change."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vllm_merge.errors import UserInputError
from vllm_merge.evaluation.offline import OfflineModel

Branch = Callable[[Tensor], Tensor]
"""ΔW x for the inputs x (…, d_in) of a module: (…, d_out)."""
LONGEST = 1 << 20  # tokens of context where a model states none


class TuningModel(OfflineModel):
    """A causal language model of transformers whose weights never change and get no gradients."""

    def __init__(self, path: str, device: str, max_tokens: int, *, chat: bool = False) -> None:
        super().__init__(path, device, max_tokens, chat=chat)
        self._model.requires_grad_(False)

    def limit(self, tokens: int) -> None:
        """The longest answer that `answers` generates."""
        self._max_tokens = tokens

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        found: torch.device = self._model.device
        return found

    @property
    def pad(self) -> int:
        """The token of padding."""
        return int(self._tokenizer.pad_token_id)

    @property
    def context(self) -> int:
        """How many tokens the model takes."""
        config = self._model.config
        return int(getattr(config.get_text_config(), "max_position_embeddings", None) or LONGEST)

    def tokens(self, prompt: str, answer: str | None, *, ends: bool = True) -> tuple[list[int], list[int]]:
        """Tokens of a prompt as it is asked, and of its answer; none for an answer that is None. ends: with its end."""
        first = self._tokenizer(self._text(prompt), add_special_tokens=not self._chat)["input_ids"]
        if answer is None:
            return list(first), []
        rest = self._tokenizer(answer, add_special_tokens=False)["input_ids"]
        end = self._tokenizer.eos_token_id
        return list(first), [*rest, *([end] if ends and end is not None else [])]

    def logits(self, ids: Tensor, there: Tensor) -> Tensor:
        """(rows, length, vocabulary) of sequences that are padded on the right."""
        found: Tensor = self._model(input_ids=ids, attention_mask=there.long(), use_cache=False).logits
        return found

    @torch.no_grad()
    def greedy(self, prompts: Sequence[list[int]], tokens: int) -> list[list[int]]:
        """The greedy answer to each prompt: at most `tokens` tokens, up to and with the end of it."""
        width = max(len(prompt) for prompt in prompts)
        ids = torch.tensor([[self.pad] * (width - len(prompt)) + prompt for prompt in prompts], device=self.device)
        there = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        made = self._model.generate(
            input_ids=ids, attention_mask=there, max_new_tokens=tokens, do_sample=False, pad_token_id=self.pad
        )
        ends = self._model.generation_config.eos_token_id
        stops = set(ends if isinstance(ends, list) else [ends])
        answers = []
        for row in made[:, width:].tolist():
            length = next((at + 1 for at, token in enumerate(row) if token in stops), len(row))
            answers.append(row[:length])
        return answers

    @contextmanager
    def attached(self, branches: Mapping[str, Branch]) -> Iterator[None]:
        """Add what each module's branch gives to what the module gives, while the block runs."""
        with self._hooks({name: _adding(branch) for name, branch in branches.items()}, "register_forward_hook"):
            yield

    @contextmanager
    def watched(self, seen: Mapping[str, Callable[[Tensor], None]]) -> Iterator[None]:
        """Show each module's inputs (rows, length, d_in) to a function, while the block runs."""
        with self._hooks({name: _showing(to) for name, to in seen.items()}, "register_forward_pre_hook"):
            yield

    @contextmanager
    def _hooks(self, hooks: Mapping[str, Callable[..., Any]], register: str) -> Iterator[None]:
        handles = []
        try:
            for name, hook in hooks.items():
                handles.append(getattr(self.module(name), register)(hook))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def module(self, name: str) -> Any:
        """The linear layer of this name. Raises UserInputError where the model has none."""
        try:
            return self._model.get_submodule(name)
        except AttributeError:
            raise UserInputError(
                f"the model has no module {name}, which an adapter changes; is it the adapters' base model?"
            ) from None


def _adding(branch: Branch) -> Callable[[Any, tuple[Tensor, ...], Tensor], Tensor]:
    def hook(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        more = branch(inputs[0]).to(output.dtype)
        # Some embeddings multiply what they look up.
        return output + (more if inputs[0].is_floating_point() else more * getattr(module, "embed_scale", 1.0))

    return hook


def _showing(to: Callable[[Tensor], None]) -> Callable[[Any, tuple[Tensor, ...]], None]:
    return lambda module, inputs: to(inputs[0])
