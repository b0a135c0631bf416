# SPDX-License-Identifier: Apache-2.0
"""Merge two adapters to a PEFT folder, from Python, and load it with PEFT.

python examples/export.py FOLDER
"""

import argparse
from pathlib import Path

from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_merge import Adapter, merge

DEMO = Path(__file__).resolve().parent / "demo"
arguments = argparse.ArgumentParser(description="Merge two adapters to a PEFT folder, and load it with PEFT.")
arguments.add_argument("folder", metavar="FOLDER", type=Path)
folder = arguments.parse_args().folder

adapters = [Adapter.from_peft(DEMO / "adapters" / name) for name in ("upper", "sort")]
merged = merge(adapters, merge_method="task_arithmetic", rank="lossless")
merged.save_pretrained(folder)
print(f"rank {merged.rank}, {len(merged.factors)} modules in {folder}")

tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(DEMO / "model"), folder)
for prompt in ("upper: stone ->", "sort: stone ->"):
    tokens = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    output = model.generate(**tokens, max_new_tokens=8, do_sample=False)
    print(tokenizer.decode(output[0], skip_special_tokens=True).splitlines()[0])
