# SPDX-License-Identifier: Apache-2.0
"""A merge that comes with the request. The server needs VLLM_MERGE_ADHOC=on."""

import os

import openai

client = openai.OpenAI(base_url=os.environ.get("VLLM_MERGE_URL", "http://127.0.0.1:8000") + "/v1", api_key="none")
ask = {"prompt": "upper: stone ->", "max_tokens": 16, "temperature": 0, "stop": ["\n"]}

# As a recipe, on any route: only registered adapters and recipes of the server's file can go in.
recipe = {
    "merge_method": "task_arithmetic",
    "adapters": [{"adapter": "upper"}, {"adapter": "reverse", "parameters": {"weight": 0.3}}],
}
answer = client.completions.create(model="any", extra_body={"merge": recipe}, **ask)
print(f"recipe ({answer.model}): {answer.choices[0].text.strip()}")

# The same as a model name, for programs that let you choose nothing else.
named = client.completions.create(model="merge:task_arithmetic(upper,reverse=0.3)", **ask)
print(f"name: {'the same artifact' if named.model == answer.model else named.model}")

# While it is kept, its label is a model like any other.
print(f"listed: {answer.model in {model.id for model in client.models.list()}}")

try:
    client.completions.create(model="merge:task_arithmetic(upper,revers=0.3)", **ask)
except openai.BadRequestError as error:
    print(f"error: {error.body['message']}")
