# SPDX-License-Identifier: Apache-2.0
"""Make the demo: pre-train the base model, train the eight adapters, measure them all on held-out prompts.

    python examples/demo/train.py --device cuda --jobs 8

writes model/, adapters/ and eval.jsonl; what was run, on what device and for how long goes to training.json.
`--stage base` and `--stage adapters` do one half each.
"""

import argparse
import json
import os
import platform
import time
from dataclasses import asdict
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from finetune import BASE_NAME, LEARNING_RATE, STEPS, WEIGHT_DECAY, train_adapter
from measure import accuracy
from peft import PeftModel
from pretrain import PretrainSettings, pretrain
from tasks import HERE, TASKS, examples
from tokenizer import build_tokenizer
from transformers import LlamaForCausalLM

SEED = 0
BASE_STEPS = 6000
EVALUATED = 50  # held-out prompts of each task


def machine(device: torch.device) -> str:
    """The device in words."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"


def run_record(device: torch.device, began: float) -> dict[str, Any]:
    """Where and how long a stage ran."""
    return {
        "seed": SEED,
        "device": machine(device),
        "minutes": round((time.monotonic() - began) / 60, 2),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "tokenizers", "safetensors")},
    }


def train_base(out: Path, device: torch.device, steps: int) -> dict[str, Any]:
    """Pre-train and save the base model with its tokenizer."""
    began = time.monotonic()
    settings = PretrainSettings(steps=steps)
    model = pretrain(settings, SEED, device, processes=os.cpu_count() or 1)
    model.save_pretrained(out / "model")
    build_tokenizer().save_pretrained(out / "model")
    return {**run_record(device, began), **asdict(settings), "parameters": model.num_parameters()}


def train_adapters(out: Path, device: torch.device, steps: int, jobs: int) -> dict[str, Any]:
    """Train and save every adapter, `jobs` of them at a time."""
    began = time.monotonic()
    work = [(name, out / "model", out / "adapters" / name, device, SEED, steps) for name in TASKS]
    with get_context("spawn").Pool(jobs) as pool:
        pool.starmap(train_adapter, work, chunksize=1)
    settings = {"steps": steps, "jobs": jobs, "learning_rate": LEARNING_RATE, "weight_decay": WEIGHT_DECAY}
    return {**run_record(device, began), **settings}


def measure_all(out: Path, device: torch.device) -> dict[str, Any]:
    """Write eval.jsonl and measure base and own adapter on it, in float32."""
    tokenizer = build_tokenizer()
    base = LlamaForCausalLM.from_pretrained(out / "model", dtype=torch.float32).to(device)
    heldout = {task.name: examples(task, "heldout", EVALUATED, SEED) for task in TASKS.values()}
    lines = [json.dumps(asdict(example)) for task in heldout.values() for example in task]
    (out / "eval.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    result = {name: {"base": accuracy(base, tokenizer, prompts)} for name, prompts in heldout.items()}
    for name, prompts in heldout.items():
        adapted = PeftModel.from_pretrained(base, out / "adapters" / name)
        result[name]["adapter"] = accuracy(adapted, tokenizer, prompts)
        base = adapted.unload()
        print(f"{name:8} base {result[name]['base']:6.1%}  adapter {result[name]['adapter']:6.1%}", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    parser.add_argument("--stage", choices=("all", "base", "adapters"), default="all", help="what to train")
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to (this one)")
    parser.add_argument("--base-steps", type=int, default=BASE_STEPS, help=f"pre-training steps ({BASE_STEPS})")
    parser.add_argument("--adapter-steps", type=int, default=STEPS, help=f"steps of each adapter ({STEPS})")
    parser.add_argument("--jobs", type=int, default=1, help="adapters to train at the same time (1)")
    args = parser.parse_args()
    device = torch.device(args.device)
    log = args.out / "training.json"
    record: dict[str, Any] = json.loads(log.read_text(encoding="utf-8")) if log.exists() else {}
    record["name"] = BASE_NAME
    args.out.mkdir(parents=True, exist_ok=True)
    if args.stage in ("all", "base"):
        record["base"] = train_base(args.out, device, args.base_steps)
        log.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if args.stage in ("all", "adapters"):
        record["adapters"] = train_adapters(args.out, device, args.adapter_steps, args.jobs)
        record["accuracy"] = measure_all(args.out, device)
        log.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
