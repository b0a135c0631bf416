# SPDX-License-Identifier: Apache-2.0
"""The base model: its tokenizer and its training, both from the corpus alone."""

from __future__ import annotations

import lzma
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, dropout
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.quality.settings import Base

END = "<end>"
HELD_OUT = 0.015  # of the documents, the last ones


def read_corpus(path: Path, max_characters: int | None) -> list[str]:
    """The documents: paragraphs between blank lines."""
    with lzma.open(path, "rt", encoding="utf-8") if path.suffix == ".xz" else path.open(encoding="utf-8") as file:
        return file.read(max_characters if max_characters is not None else -1).strip().split("\n\n")


def train_tokenizer(documents: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE; `<end>` ends documents and answers, and pads."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END, padding_side="left")


def build_model(settings: Base, vocabulary: int) -> LlamaForCausalLM:
    """The untrained model, float32."""
    torch.manual_seed(settings.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=settings.width,
            intermediate_size=settings.hidden,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            num_key_value_heads=settings.heads,
            max_position_embeddings=settings.context,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=0,
        )
    )


def train_base(corpus: Path, folder: Path, settings: Base, device: torch.device) -> dict[str, Any]:
    """Train tokenizer and model, write both to the folder, the weights rounded to bfloat16, and say how it went."""
    began = time.monotonic()
    documents = read_corpus(corpus, settings.max_characters)
    tokenizer = train_tokenizer(documents, settings.vocabulary)
    held_out = max(1, round(HELD_OUT * len(documents)))
    train, valid = (
        _windows(tokenizer, part, settings.context) for part in (documents[:-held_out], documents[-held_out:])
    )
    tokenized = time.monotonic()
    model = build_model(settings, len(tokenizer)).to(device)
    losses = _train(model, train.to(device), valid.to(device), settings)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {
        "parameters": model.num_parameters(),
        "train_tokens": train.numel(),
        "losses": losses,
        "seconds_tokenizer": round(tokenized - began, 1),
        "seconds": round(time.monotonic() - tokenized, 1),
    }


def _windows(tokenizer: PreTrainedTokenizerFast, documents: list[str], context: int) -> Tensor:
    """All documents one after another, cut into windows, (windows, context) int16 or wider."""
    encodings = tokenizer.backend_tokenizer.encode_batch_fast(documents, add_special_tokens=False)
    ids = np.concatenate([np.array([*encoding.ids, 0], dtype=np.int32) for encoding in encodings])
    context = min(context, len(ids))
    return torch.from_numpy(ids[: len(ids) // context * context].reshape(-1, context))


def _train(model: LlamaForCausalLM, train: Tensor, valid: Tensor, settings: Base) -> list[dict[str, float]]:
    """AdamW with a cosine; the model has the weights with the least held-out loss afterwards."""
    device = model.device
    steps = max(1, round(settings.epochs * len(train) / settings.batch))
    optimizer = torch.optim.AdamW(
        _groups(model, settings), lr=settings.learning_rate, betas=(0.9, 0.95), fused=device.type == "cuda"
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _share(step, steps))
    hooks = _dropping(model, settings.dropout)
    order = _order(len(train), settings.seed)
    checks = {round(steps * (index + 1) / settings.checks) for index in range(settings.checks)} | {steps}
    found: list[dict[str, float]] = []
    best: dict[str, Tensor] = {}
    model.train()
    for step in range(1, steps + 1):
        rows = torch.tensor([next(order) for _ in range(settings.batch)], device=device)
        loss = _loss(model, train[rows].long())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if step in checks:
            found.append({"step": step, "train": round(loss.item(), 4), "valid": round(_held_out(model, valid), 4)})
            print(f"base: step {step} of {steps}, loss {found[-1]['train']}, held out {found[-1]['valid']}", flush=True)
            if found[-1]["valid"] <= min(row["valid"] for row in found):
                best = {name: value.clone() for name, value in model.state_dict().items()}
    for hook in hooks:
        hook.remove()
    model.load_state_dict(best)
    model.eval()
    return found


def _groups(model: nn.Module, settings: Base) -> list[dict[str, Any]]:
    """Weight decay for matrices, none for norms."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    return [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]


def _share(step: int, steps: int) -> float:
    """Of the learning rate: linear warm-up over 3 %, then a cosine down to a tenth."""
    warm = max(1, round(0.03 * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _dropping(model: nn.Module, share: float) -> list[Any]:
    """Dropout on what attention and MLP add to the residual stream, which Llama has not by itself."""

    def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return dropout(output, share, model.training)

    ends = [module for name, module in model.named_modules() if name.endswith(("o_proj", "down_proj", "embed_tokens"))]
    return [module.register_forward_hook(hook) for module in ends] if share else []


def _order(count: int, seed: int) -> Iterator[int]:
    """All windows in a new order each time."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


def _loss(model: LlamaForCausalLM, tokens: Tensor) -> Tensor:
    with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
        logits = model(input_ids=tokens, use_cache=False).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


@torch.no_grad()
def _held_out(model: LlamaForCausalLM, valid: Tensor) -> float:
    model.eval()
    losses = [_loss(model, valid[start : start + 32].long()).item() for start in range(0, len(valid), 32)]
    model.train()
    return sum(losses) / len(losses)
