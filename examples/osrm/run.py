# SPDX-License-Identifier: Apache-2.0
"""Adapters trained from the OSRM initialisation beside plain ones: prepare, train with PEFT, merge, compare.

    python examples/osrm/run.py [--steps 80] [--out DIR]

Three tasks of the demo, on the demo's base model; a few minutes on a CPU. It needs this package, `peft`, `transformers` and `accelerate`.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from transformers.trainer_utils import set_seed

from vllm_merge import Adapter, LoraFactors, merge
from vllm_merge.evaluation.offline import OfflineModel

DEMO = Path(__file__).resolve().parent.parent / "demo"
sys.path.insert(0, str(DEMO))

from tasks import TASKS, examples  # noqa: E402  (a neighbour of this script, not a package)

CHOSEN = ("sort", "upper", "double")
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK, ALPHA, BATCH, LEARNING_RATE = 8, 16, 16, 3e-3
LAMBDAS = (0.4, 0.6, 0.8, 1.0)


def write_tasks(folder: Path, count: int = 2000) -> None:
    """A folder for each task, with train.jsonl; the answer ends with a newline."""
    for name in CHOSEN:
        (folder / name).mkdir(parents=True, exist_ok=True)
        rng, task = random.Random(name), TASKS[name]
        sources = [task.draw(rng, "train") for _ in range(count)]
        lines = [json.dumps({"text": task.prompt(word), "label": task.answer(word)}) for word in sources]
        (folder / name / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def prepare(data: Path, out: Path) -> None:
    """The command this example is about."""
    command = [
        sys.executable,
        "-m",
        "vllm_merge",
        "osrm",
        str(DEMO / "model"),
        "--tasks",
        *(str(data / name) for name in CHOSEN),
    ]
    command += [
        "--rank",
        str(RANK),
        "--alpha",
        str(ALPHA),
        "--target-modules",
        *MODULES,
        "--template",
        "{text}{label}",
        "-o",
        str(out),
    ]
    subprocess.run(command, check=True)


def train(model: Any, data: Path, folder: Path, steps: int) -> None:
    """PEFT model → transformers' Trainer → PEFT folder. The loss is that of the answer's tokens."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    arguments = TrainingArguments(
        output_dir=str(folder.with_name(f".{folder.name}")),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=LEARNING_RATE,
        warmup_steps=max(1, steps // 10),
        lr_scheduler_type="cosine",
        remove_unused_columns=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=max(1, steps // 3),
        use_cpu=not torch.cuda.is_available(),
        seed=0,
    )
    Trainer(
        model=model, args=arguments, train_dataset=rows, data_collator=lambda batch: collated(tokenizer, batch)
    ).train()
    model.save_pretrained(folder)


def collated(tokenizer: Any, batch: Sequence[Mapping[str, str]]) -> dict[str, torch.Tensor]:
    """Ids padded on the right, and labels that leave prompts and padding out."""
    prompts = [tokenizer(row["text"])["input_ids"] for row in batch]
    answers = [tokenizer(row["label"] + "\n", add_special_tokens=False)["input_ids"] for row in batch]
    width = max(len(one) + len(two) for one, two in zip(prompts, answers, strict=True))
    ids = torch.full((len(batch), width), tokenizer.pad_token_id)
    labels = torch.full_like(ids, -100)
    for index, (one, two) in enumerate(zip(prompts, answers, strict=True)):
        ids[index, : len(one) + len(two)] = torch.tensor(one + two)
        labels[index, len(one) : len(one) + len(two)] = torch.tensor(two)
    return {"input_ids": ids, "labels": labels}


def right(model: OfflineModel, factors: Mapping[str, LoraFactors], task: str, count: int) -> float:
    """The share of held-out prompts that are answered exactly."""
    mine = examples(TASKS[task], "heldout", count, 0)
    found = model.answers(factors, [example.prompt for example in mine], lambda done: None)
    return sum(text.strip() == example.answer for text, example in zip(found, mine, strict=True)) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=80, help="training steps of each adapter (80)")
    parser.add_argument("--prompts", type=int, default=40, help="held-out prompts of each task (40)")
    parser.add_argument("--out", type=Path, help="keep data, starts and adapters here")
    args = parser.parse_args()
    out = args.out or Path(tempfile.mkdtemp(prefix="osrm-"))
    write_tasks(out / "data")
    prepare(out / "data", out / "starts")
    for name in CHOSEN:
        for kind in ("plain", "osrm"):
            set_seed(0)
            base = AutoModelForCausalLM.from_pretrained(DEMO / "model", dtype=torch.float32)
            if kind == "osrm":
                model = PeftModel.from_pretrained(base, out / "starts" / name, is_trainable=True)
            else:
                config = LoraConfig(
                    task_type=TaskType.CAUSAL_LM, r=RANK, lora_alpha=ALPHA, target_modules=list(MODULES)
                )
                model = get_peft_model(base, config)
            print(f"training {name}, {kind}", flush=True)
            train(model, out / "data" / name, out / kind / name, args.steps)
    asked = OfflineModel(str(DEMO / "model"), "cpu", 20)
    print(f"{'right, %':16}" + "".join(f"{name:>9}" for name in CHOSEN) + f"{'mean':>9}")
    for kind in ("plain", "osrm"):
        adapters = [Adapter.from_peft(out / kind / name) for name in CHOSEN]
        show(f"{kind} alone", [right(asked, a.factors, a.name, args.prompts) for a in adapters])
        merged = {lam: merge(adapters, merge_method="task_arithmetic", parameters={"lambda": lam}) for lam in LAMBDAS}
        for lam, result in merged.items():
            show(f"{kind} λ = {lam}", [right(asked, result.factors, name, args.prompts) for name in CHOSEN])
    print(f"everything is in {out}")


def show(name: str, shares: Sequence[float]) -> None:
    """A line of the table."""
    print(f"{name:16}" + "".join(f"{100 * share:9.0f}" for share in [*shares, sum(shares) / len(shares)]), flush=True)


if __name__ == "__main__":
    main()
