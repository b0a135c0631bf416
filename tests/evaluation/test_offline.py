# SPDX-License-Identifier: Apache-2.0
"""Answers of the demo's model in this process."""

import json
import sys
import warnings
from pathlib import Path

import pytest
import torch

from vllm_merge import Adapter, LoraFactors, MergeError, UserInputError

pytest.importorskip("transformers")

from vllm_merge.evaluation.offline import OfflineModel

DEMO = Path(__file__).parents[2] / "examples/demo"
REVERSED = [
    example
    for example in map(json.loads, (DEMO / "eval.jsonl").read_text().splitlines())
    if example["task"] == "reverse"
][:20]
PROMPTS = [example["prompt"] for example in REVERSED]


@pytest.fixture(scope="module")
def model() -> OfflineModel:
    return OfflineModel(str(DEMO / "model"), "cpu", 20)


def right(answers: list[str]) -> int:
    return sum(text.strip() == example["answer"] for text, example in zip(answers, REVERSED, strict=True))


def test_factors_are_added_and_taken_away_again(model: OfflineModel) -> None:
    done: list[int] = []
    adapter = Adapter.from_peft(DEMO / "adapters/reverse")
    before = model.answers({}, PROMPTS, done.append)
    assert right(model.answers(adapter.factors, PROMPTS, done.append)) >= 18
    assert right(before) <= 2
    assert model.answers({}, PROMPTS, done.append) == before
    assert done == [16, 20] * 3


def test_same_answers_as_peft(model: OfflineModel) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    base = transformers.AutoModelForCausalLM.from_pretrained(DEMO / "model", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO / "model", padding_side="left")
    wrapped = peft.PeftModel.from_pretrained(base, DEMO / "adapters/sort").eval()
    batch = tokenizer(PROMPTS[:4], return_tensors="pt", padding=True)
    tokens = wrapped.generate(**batch, max_new_tokens=20, do_sample=False)[:, batch["input_ids"].shape[1] :]
    expected = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    factors = Adapter.from_peft(DEMO / "adapters/sort").factors
    assert model.answers(factors, PROMPTS[:4], lambda done: None) == expected


def test_an_embedding_changes_the_input_alone(model: OfflineModel) -> None:
    """The demo's head has the embedding's weight; the answers are PEFT's, whose forward pass leaves the head as it is."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    base = transformers.AutoModelForCausalLM.from_pretrained(DEMO / "model", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO / "model", padding_side="left")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the head is tied
        wrapped = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=4, target_modules=["embed_tokens"])).eval()
    layer = wrapped.base_model.model.model.embed_tokens
    generator = torch.Generator().manual_seed(0)
    for factors in (layer.lora_embedding_A, layer.lora_embedding_B):
        factors["default"].data.normal_(0, 1.0, generator=generator)
    batch = tokenizer(PROMPTS[:4], return_tensors="pt", padding=True)
    tokens = wrapped.generate(**batch, max_new_tokens=20, do_sample=False)[:, batch["input_ids"].shape[1] :]
    expected = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    a, b = (factors["default"].detach() for factors in (layer.lora_embedding_A, layer.lora_embedding_B))
    changed = {"model.embed_tokens": LoraFactors(a, b, embedding=True)}
    assert model.answers(changed, PROMPTS[:4], lambda done: None) == expected
    assert model.answers({}, PROMPTS[:4], lambda done: None) != expected


def test_modules_that_the_model_does_not_have(model: OfflineModel) -> None:
    factors = {"model.layers.77.q_proj": LoraFactors(torch.ones(1, 2), torch.ones(2, 1))}
    with pytest.raises(UserInputError) as caught:
        model.answers(factors, PROMPTS[:1], lambda done: None)
    assert str(caught.value) == (
        "the model has no module model.layers.77.q_proj, which the adapter changes; is it the adapter's base model?"
    )


def test_no_model_there(tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match=rf"^base model {tmp_path}: transformers cannot load it: "):
        OfflineModel(str(tmp_path), "cpu", 5)


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MergeError) as caught:
        OfflineModel("any", "cpu", 5)
    assert str(caught.value) == (
        "transformers is not installed, which runs models without a server; install it with "
        "`pip install transformers`, or give --server URL"
    )
