# SPDX-License-Identifier: Apache-2.0
"""A program: the same merges on one base model in one engine, made by us and as ordinary adapters that vLLM reads itself.

python two_ways.py MODEL DTYPE PROMPTS NAME=FOLDER …

VLLM_MERGE_CONFIG is the recipe file, PROMPTS a JSON list, FOLDER the offline merge of recipe NAME. Prints a line of JSON:
{"ours": {NAME: [the tokens of every prompt and answer, their log-probabilities from the second on]}, "theirs": …, "base":
{"": …}}. A prompt at a time, so that both are computed alike.
"""

import json
import sys
from typing import Any

GENERATED = 8


def main() -> None:
    import torch
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    from vllm_merge.serving import merge_request

    model, dtype, prompts, *exports = sys.argv[1:]
    folders = dict(export.split("=", 1) for export in exports)
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

    found = {
        "ours": {name: answers(merge_request(name)) for name in folders},
        "theirs": {
            name: answers(LoRARequest(f"{name}-exported", number, folder))
            for number, (name, folder) in enumerate(folders.items(), 1)
        },
        "base": {"": answers(None)},
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
