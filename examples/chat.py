# SPDX-License-Identifier: Apache-2.0
"""A recipe, an alias and an adapter are models like any other."""

import os

from openai import OpenAI

client = OpenAI(base_url=os.environ.get("VLLM_MERGE_URL", "http://127.0.0.1:8000") + "/v1", api_key="none")
for model in ("weighted", "assistant", "reverse"):
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "reverse: stone ->"}],
        max_tokens=16,
        temperature=0,
        stop=["\n"],
    )
    print(f"{model} ({answer.model}): {answer.choices[0].message.content}")
