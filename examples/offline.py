# SPDX-License-Identifier: Apache-2.0
"""Merged adapters without a server, through vLLM's `LLM` class.

python examples/offline.py
"""

from __future__ import annotations

import json
import os
from pathlib import Path

DEMO = Path(__file__).resolve().parent / "demo"
CONFIG = DEMO.parent.parent / "configs" / "demo.yaml"


def main() -> None:
    os.environ["VLLM_MERGE_CONFIG"] = str(CONFIG)  # before the LLM is made: its workers load the plugin then
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

    from vllm import LLM, SamplingParams

    from vllm_merge.serving import merge_request

    llm = LLM(
        str(DEMO / "model"),
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        gpu_memory_utilization=0.3,
        enable_lora=True,
        max_loras=2,
        max_lora_rank=64,
    )
    lines = [json.loads(line) for line in (DEMO / "eval.jsonl").read_text().splitlines()]
    items = list({item["task"]: item for item in lines}.values())
    greedy = SamplingParams(temperature=0, max_tokens=24, stop=["\n"])
    for name in ("assistant", "reverse"):
        request = merge_request(name)  # merged in the worker by the time this returns
        outputs = llm.generate([item["prompt"] for item in items], greedy, lora_request=request, use_tqdm=False)
        for item, output in zip(items, outputs, strict=True):
            right = "right" if output.outputs[0].text.strip() == item["answer"] else "wrong"
            print(f"{request.lora_name}\t{right}\t{item['prompt']}{output.outputs[0].text}")


if __name__ == "__main__":
    main()
