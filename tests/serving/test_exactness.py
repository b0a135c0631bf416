# SPDX-License-Identifier: Apache-2.0
"""What the server computes with an adapter or a merge is what transformers and PEFT compute with the same tensors.

Both run in float32. The server is asked for the log-probabilities of the prompt's tokens and of the tokens it generates
greedily; the reference gives its own for exactly those tokens (teacher forcing). The reference adapter of a recipe is the
PEFT folder that the offline merge of the same file exports, of an adapter the source folder itself.
"""

import shutil

import pytest
import torch
from openai import OpenAI
from safetensors.torch import load_file, save_file

from tests.conftest import DEMO
from tests.serving.test_routes import ADAPTERS, MERGES, RECIPES
from vllm_merge.adapters.base_model import base_model_hash
from vllm_merge.adapters.peft import hash_adapter
from vllm_merge.methods.registry import default_registry
from vllm_merge.plan_runner import run_plan
from vllm_merge.recipe.plan import make_plan

LIMIT = 1e-4
PROMPTS = 100
GENERATED = 8


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """{name: PEFT folder} of every recipe, merged offline for a server of rank 64, and of every adapter."""
    folder = tmp_path_factory.mktemp("exported")
    registry = default_registry()
    hashes = {name: hash_adapter(source.path) for name, source in RECIPES.adapters.items()}
    folders = {name: source.path for name, source in RECIPES.adapters.items()}
    for name in MERGES:
        plan = make_plan(
            RECIPES,
            name,
            registry=registry,
            adapter_hashes=hashes,
            base_model_hash=base_model_hash(str(DEMO / "model")),
            max_rank=64,
            dtype="float32",
        )
        run_plan(plan, device="cpu", dtype=torch.float32).save_pretrained(folder / name)
        folders[name] = str(folder / name)
    return folders


class Reference:
    """transformers + PEFT in float32."""

    def __init__(self):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
        self.base = lambda: AutoModelForCausalLM.from_pretrained(DEMO / "model", dtype=torch.float32).eval()

    def load(self, folder):
        from peft import PeftModel

        return PeftModel.from_pretrained(self.base(), folder).eval()

    @torch.no_grad()
    def logprobs(self, model, sequences: list[list[int]]) -> list[torch.Tensor]:
        """log p(token | tokens before it), for every token but the first, of each sequence."""
        longest = max(map(len, sequences))
        batch = torch.tensor([s + [0] * (longest - len(s)) for s in sequences])
        mask = torch.tensor([[1] * len(s) + [0] * (longest - len(s)) for s in sequences])
        log_p = model(input_ids=batch, attention_mask=mask).logits.log_softmax(-1)
        rows = log_p[:, :-1].gather(-1, batch[:, 1:, None]).squeeze(-1)
        return [row[: len(s) - 1] for row, s in zip(rows, sequences, strict=True)]


@pytest.fixture(scope="module")
def reference():
    return Reference()


def served(server, name: str, prompts: list[str]) -> tuple[list[list[int]], list[torch.Tensor]]:
    """(token ids of prompt and answer, their log-probabilities from the second on), as the server gives them."""
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        answer = client.completions.create(
            model=name,
            prompt=prompts,
            max_tokens=GENERATED,
            temperature=0,
            logprobs=0,
            extra_body={"prompt_logprobs": 0, "return_token_ids": True, "ignore_eos": True},
        )
    sequences, values = [], []
    for choice in sorted(answer.choices, key=lambda c: c.index):
        extra = choice.model_extra
        ids = extra["prompt_token_ids"]
        prompt_values = [
            step[str(token)]["logprob"] for token, step in zip(ids[1:], extra["prompt_logprobs"][1:], strict=True)
        ]
        sequences.append([*ids, *extra["token_ids"]])
        values.append(torch.tensor([*prompt_values, *choice.logprobs.token_logprobs]))
    return sequences, values


def largest_difference(server, reference, folder, name, prompts) -> float:
    sequences, values = served(server, name, prompts)
    expected = reference.logprobs(reference.load(folder), sequences)
    return max(float((a - b).abs().max()) for a, b in zip(values, expected, strict=True))


@pytest.mark.parametrize("name", [*MERGES, *ADAPTERS])
def test_the_server_gives_the_log_probabilities_of_the_reference(demo_server, reference, exported, prompts, name):
    texts = [item["prompt"] for item in prompts[:: max(1, len(prompts) // PROMPTS)]][:PROMPTS]
    assert len(texts) == PROMPTS
    difference = largest_difference(demo_server, reference, exported[name], name, texts)
    assert difference <= LIMIT, f"{name}: largest |Δ logprob| {difference:.2e}"


def test_one_module_changed_by_one_percent_is_seen(demo_server, reference, exported, prompts, tmp_path):
    name = MERGES[0]
    folder = tmp_path / "changed"
    shutil.copytree(exported[name], folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    changed = next(key for key in sorted(tensors) if ".lora_B." in key and ".layers.1." in key)
    tensors[changed] = tensors[changed] * 1.01
    save_file(tensors, folder / "adapter_model.safetensors")
    texts = [item["prompt"] for item in prompts[:: max(1, len(prompts) // PROMPTS)]][:PROMPTS]
    assert largest_difference(demo_server, reference, folder, name, texts) > LIMIT


def test_the_demo_covers_patterns_and_rslora():
    import json
    from pathlib import Path

    configs = [json.loads((Path(s.path) / "adapter_config.json").read_text()) for s in RECIPES.adapters.values()]
    assert any(c.get("use_rslora") for c in configs)
    assert any(c.get("rank_pattern") and c.get("alpha_pattern") for c in configs)
