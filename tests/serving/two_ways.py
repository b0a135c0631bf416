# SPDX-License-Identifier: Apache-2.0
"""A program: the same merges on one base model in one engine, made by us and as ordinary adapters that vLLM reads itself.

python two_ways.py MODEL DTYPE PROMPTS NAME=FOLDER …

VLLM_MERGE_CONFIG is the recipe file, PROMPTS a JSON list, FOLDER the offline merge of recipe NAME; NAME/… is another folder
for it. Prints a line of JSON: {"ours": {NAME: [the tokens of every prompt and answer, their log-probabilities from the second
on]}, "again": the same once more, "same": what vLLM makes of the very bytes that we serve, from the disk tier, "theirs": of
each FOLDER, "base": {"": …}}. A prompt at a time, so that all are computed alike.
"""

import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

GENERATED = 8


def written(disk: Path, request: Any) -> str:
    """The folder of an artifact, which a worker writes in the background."""
    folder = disk / re.findall(r"[0-9a-f]{64}", request.lora_path)[0]
    deadline = time.monotonic() + 120
    while not folder.exists():
        assert time.monotonic() < deadline, f"{request.lora_name} was not written"
        time.sleep(0.05)
    return str(folder)


def main(disk: Path) -> None:
    import torch
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    from vllm_merge.serving import merge_request

    model, dtype, prompts, *exports = sys.argv[1:]
    folders = dict(export.split("=", 1) for export in exports)
    names = [name for name in folders if "/" not in name]
    limits = {
        "max_model_len": 256,
        "max_num_seqs": 1,
        "max_loras": 2,
        "max_lora_rank": 64,
        "enable_prefix_caching": False,
        "gpu_memory_utilization": 0.3,
    }
    if torch.cuda.is_available():  # where several of these share a GPU
        limits |= {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 256 << 20}
    llm = LLM(model, dtype=dtype, enforce_eager=True, enable_lora=True, **limits)
    asked = SamplingParams(max_tokens=GENERATED, temperature=0, logprobs=0, prompt_logprobs=0, ignore_eos=True)

    def answers(request: Any) -> list[Any]:
        sequences, values = [], []
        for prompt in json.loads(prompts):
            (output,) = llm.generate([prompt], asked, lora_request=request, use_tqdm=False)
            (choice,) = output.outputs
            steps = [*zip(output.prompt_token_ids, output.prompt_logprobs, strict=True)][1:]
            steps += zip(choice.token_ids, choice.logprobs, strict=True)
            sequences.append([*output.prompt_token_ids, *choice.token_ids])
            values.append([found[token].logprob for token, found in steps])
        return [sequences, values]

    ids = iter(range(1, 100))

    def by_vllm(name: str, folder: str) -> list[Any]:
        return answers(LoRARequest(f"{name.replace('/', '-')}-read", next(ids), folder))

    found = {
        "ours": {name: answers(merge_request(name)) for name in names},
        "again": {name: answers(merge_request(name)) for name in names},
        "same": {name: by_vllm(f"{name}/same", written(disk, merge_request(name))) for name in names},
        "theirs": {name: by_vllm(name, folder) for name, folder in folders.items()},
        "base": {"": answers(None)},
    }
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    # First, so that vLLM's engine is ended before Python waits for its process: what is registered to be done at the end is done
    # in reverse order, and a temporary folder registers the finalizers.
    import multiprocessing.util  # noqa: F401

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ["VLLM_MERGE_DISK"] = folder
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # another process imports everything once more
        main(Path(folder))
