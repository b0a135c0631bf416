# SPDX-License-Identifier: Apache-2.0
"""Training of the demo's adapters with PEFT: each learns what one instruction word means, and no other.

The loss is the cross-entropy of the task's answers plus the divergence from the base model on pre-training documents
under any other label. The second part is what keeps an adapter out of the way of the others when they are merged.
"""

import math
import random
from pathlib import Path
from typing import Any

import torch
from corpus import document_rows
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from pretrain import answer_mask
from tasks import TASKS, Task
from tokenizer import BOS, PAD, encode
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers import LlamaForCausalLM

STEPS = 250
TASK_BATCH = 256
DOCUMENT_BATCH = 64
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 5.0  # keeps adapters small, and small adapters add up better
BASE_NAME = "vllm-merge-demo"

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


def lora(**settings: Any) -> LoraConfig:
    """A LoRA configuration for a causal language model."""
    return LoraConfig(task_type=TaskType.CAUSAL_LM, **settings)


# As different as adapters from different teams are: ranks, alphas, target modules, rsLoRA, patterns. The ranks of any
# module add up to at most 64, so that even a lossless merge of all eight fits a server with --max-lora-rank 64.
ADAPTERS = {
    "reverse": lora(r=8, lora_alpha=16, target_modules=ATTENTION),
    "upper": lora(r=4, lora_alpha=8, target_modules=MLP),
    "sort": lora(r=16, lora_alpha=16, target_modules=ATTENTION + MLP),
    "add": lora(r=8, lora_alpha=12, target_modules=["q_proj", "v_proj"]),
    "plural": lora(r=6, lora_alpha=9, target_modules=[*ATTENTION, "down_proj"]),
    "double": lora(r=4, lora_alpha=4, target_modules=["q_proj", "v_proj", "o_proj"]),
    "vowels": lora(r=8, lora_alpha=6, use_rslora=True, target_modules=[*ATTENTION, "up_proj"]),
    "next": lora(
        r=8,
        lora_alpha=16,
        target_modules=ATTENTION + MLP,
        rank_pattern={"mlp.down_proj": 4, "layers.4.self_attn.q_proj": 10},
        alpha_pattern={"mlp.down_proj": 6, "layers.0.self_attn.v_proj": 12},
    ),
}


def task_rows(task: Task, rng: random.Random, count: int) -> Tensor:
    """`count` training examples as token ids, padded on the right: (count, longest)."""
    rows = []
    for _ in range(count):
        source = task.draw(rng, "train")
        rows.append(torch.from_numpy(encode(f"{task.prompt(source)}{task.answer(source)}\n")).long())
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
    return torch.nn.functional.pad(padded, (1, 0), value=BOS)


def answer_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Cross-entropy over the tokens of the answers, the newline that ends each included."""
    answered = answer_mask(tokens)[:, 1:]
    return cross_entropy(logits[:, :-1][answered].float(), tokens[:, 1:][answered])


def train_adapter(name: str, base_folder: Path, folder: Path, device: torch.device, seed: int, steps: int) -> None:
    """Train the adapter of one task on the float32 base and save it, in bfloat16, as a PEFT folder."""
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")
    task, rng = TASKS[name], random.Random(f"adapter/{name}/{seed}")
    base = LlamaForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    model = get_peft_model(base.to(device), ADAPTERS[name])
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    for step in range(steps):
        tokens = task_rows(task, rng, TASK_BATCH).to(device)
        documents = torch.from_numpy(document_rows(rng, DOCUMENT_BATCH, exclude=name)).long().to(device)
        with torch.no_grad(), model.disable_adapter():
            reference = log_softmax(model(input_ids=documents, use_cache=False).logits, -1)
        adapted = log_softmax(model(input_ids=documents, use_cache=False).logits, -1)
        drift = kl_div(adapted, reference, reduction="none", log_target=True).sum(-1).mean()
        error = answer_loss(model(input_ids=tokens, use_cache=False).logits, tokens)
        optimizer.zero_grad()
        (error + drift).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"adapter {name}, step {step}: error {error.item():.4f}, drift {drift.item():.4f}", flush=True)
    save_adapter(model, folder)


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Save the adapter as PEFT does, in bfloat16, with nothing in it that names the machine it was made on."""
    model.to(torch.bfloat16)
    config = model.peft_config["default"]
    config.base_model_name_or_path = BASE_NAME
    config.target_modules = sorted(config.target_modules)
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
