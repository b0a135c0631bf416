# SPDX-License-Identifier: Apache-2.0
"""Requests to several merges and adapters at once; vLLM runs them in the same batches."""

import asyncio
import os

from openai import AsyncOpenAI

MODELS = ("weighted", "task-arithmetic", "knots-ties", "upper")


async def main() -> None:
    url = os.environ.get("VLLM_MERGE_URL", "http://127.0.0.1:8000")
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
        calls = (
            client.completions.create(model=model, prompt="upper: stone ->", max_tokens=16, temperature=0, stop=["\n"])
            for model in MODELS
        )
        for model, answer in zip(MODELS, await asyncio.gather(*calls), strict=True):
            print(f"{model}: {answer.choices[0].text.strip()}")


asyncio.run(main())
