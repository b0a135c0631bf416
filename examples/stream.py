# SPDX-License-Identifier: Apache-2.0
"""A merged model, token by token."""

import os

from openai import OpenAI

client = OpenAI(base_url=os.environ.get("VLLM_MERGE_URL", "http://127.0.0.1:8000") + "/v1", api_key="none")
stream = client.chat.completions.create(
    model="assistant",
    messages=[{"role": "user", "content": "sort: garage ->"}],
    max_tokens=16,
    temperature=0,
    stop=["\n"],
    stream=True,
)
for chunk in stream:
    if chunk.choices:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
