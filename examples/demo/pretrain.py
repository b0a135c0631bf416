# SPDX-License-Identifier: Apache-2.0
"""Pre-training of the demo's base model, a Llama of 2.5 million parameters, from scratch on the made-up corpus."""

import math
from dataclasses import dataclass

import torch
from corpus import build_corpus
from rich.progress import track
from tokenizer import BOS, EOS, PAD, VOCABULARY
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

PROMPT_WEIGHT = 0.1  # the loss of a token that is no answer: sources are random, there is little to learn from them
ARROW_END = VOCABULARY[">"]


@dataclass(frozen=True)
class PretrainSettings:
    """How long and how the base model is trained."""

    steps: int
    batch: int = 512
    documents: int = 1_500_000
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.05
    warmup: int = 200


def build_model() -> LlamaForCausalLM:
    """The untrained model; grouped-query attention, tied embeddings, float32."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=256,
            intermediate_size=384,
            num_hidden_layers=5,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=32,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=EOS,
        )
    )


def answer_mask(tokens: Tensor) -> Tensor:
    """True at the tokens of an answer, its newline included: (batch, length) ids to (batch, length) bool."""
    at = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    last_arrow = torch.where(tokens == ARROW_END, at, -1).cummax(1).values
    last_newline = torch.where(tokens == EOS, at, -1).cummax(1).values
    follows = last_arrow[:, :-1] > last_newline[:, :-1]  # the token before is in an answer or is the arrow before it
    return torch.nn.functional.pad(follows, (1, 0))


def document_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Cross-entropy of the next token, answers weighted 1 and all else PROMPT_WEIGHT."""
    weight = torch.where(answer_mask(tokens), 1.0, PROMPT_WEIGHT)[:, 1:] * (tokens[:, 1:] != PAD)
    losses = cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none")
    return (losses * weight.flatten()).sum() / weight.sum()


def schedule(step: int, settings: PretrainSettings) -> float:
    """The share of the learning rate at a step: linear warm-up, then a cosine down to 1 %."""
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done))


def pretrain(settings: PretrainSettings, seed: int, device: torch.device, processes: int) -> LlamaForCausalLM:
    """Train the base model and return it in bfloat16, as it is saved."""
    torch.manual_seed(seed)
    model = build_model().to(device)
    corpus = torch.from_numpy(build_corpus(settings.documents, seed, processes)).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=settings.weight_decay
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, settings))
    on_gpu = device.type == "cuda"
    forward = torch.compile(model) if on_gpu else model
    picker = torch.Generator(device).manual_seed(seed)
    for step in track(range(settings.steps), "pre-training"):
        rows = torch.randint(len(corpus), (settings.batch,), generator=picker, device=device)
        tokens = corpus[rows].long()
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
            logits = forward(input_ids=tokens, use_cache=False).logits
        loss = document_loss(logits, tokens)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if step % 500 == 0 or step == settings.steps - 1:
            print(f"step {step}: loss {loss.item():.4f}", flush=True)
    return model.to(torch.bfloat16)
