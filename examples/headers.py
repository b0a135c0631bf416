# SPDX-License-Identifier: Apache-2.0
"""Which artifact answered, and what a name that does not exist gets."""

import os

from openai import NotFoundError, OpenAI

client = OpenAI(base_url=os.environ.get("VLLM_MERGE_URL", "http://127.0.0.1:8000") + "/v1", api_key="none")
raw = client.completions.with_raw_response.create(
    model="assistant", prompt="plural: box ->", max_tokens=8, temperature=0
)
print("asked for", raw.headers["x-vllm-merge-name"], "answered by", raw.headers["x-vllm-merge-artifact"])
try:
    client.completions.create(model="asistant", prompt="plural: box ->")
except NotFoundError as error:
    print("error:", error.body["message"])
