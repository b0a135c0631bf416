# SPDX-License-Identifier: Apache-2.0
"""Folders against the real PEFT: what it saves we read exactly, what we write it loads exactly."""

import json
import warnings
from pathlib import Path

import pytest
import torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from vllm_merge.adapters.factors import LoraFactors  # noqa: E402
from vllm_merge.adapters.peft import read_adapter, write_adapter  # noqa: E402

LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}
TOKENS = torch.arange(24).reshape(2, 12)


def tiny_llama() -> "transformers.LlamaForCausalLM":
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)).eval()


def fill(model: "peft.PeftModel") -> None:
    """Random factors everywhere; PEFT starts B at zero."""
    generator = torch.Generator().manual_seed(1)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.data.normal_(0, 0.3, generator=generator)


def peft_deltas(model: "peft.PeftModel") -> dict[str, torch.Tensor]:
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default")
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


SOURCES = {
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]},
    "rslora": {"r": 4, "lora_alpha": 8, "target_modules": ["v_proj"], "use_rslora": True},
    "rank_pattern": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 2},
    },
    "alpha_pattern": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "alpha_pattern": {"v_proj": 3}},
    "regex_patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "k_proj"],
        "rank_pattern": {r"layers\.[0-3]\..*": 3, "q_proj": 6},  # both match q_proj of layers 0-3: the first wins
        "alpha_pattern": {"^model.layers.1.self_attn.k_proj": 5, r"self_attn\.(q|k)_proj": 7},
    },
    "rslora_patterns": {
        "r": 8,
        "lora_alpha": 16,
        "target_modules": "all-linear",
        "use_rslora": True,
        "rank_pattern": {"down_proj": 2},
        "alpha_pattern": {"layers.11.mlp.up_proj": 1.5},
    },
    "some_layers": {"r": 2, "lora_alpha": 1, "target_modules": ["o_proj"], "layers_to_transform": [1, 5]},
    "lm_head": {"r": 2, "lora_alpha": 2, "target_modules": ["lm_head", "q_proj"]},
}


@pytest.mark.parametrize("case", SOURCES)
def test_read_gives_pefts_delta(case: str, tmp_path: Path) -> None:
    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(**SOURCES[case]))
    fill(model)
    model.save_pretrained(tmp_path)

    adapter = read_adapter(tmp_path, "x")

    expected = peft_deltas(model)
    assert set(adapter.factors) == set(expected)
    for module, delta in expected.items():
        torch.testing.assert_close(adapter.factors[module].delta(), delta, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_read_keeps_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"]))
    fill(model)
    model.to(dtype).save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path)
    saved = {k: v for k, v in model.named_parameters() if "lora_A" in k}
    assert len(adapter.factors) == len(saved) == LLAMA["num_hidden_layers"]
    for module, pair in adapter.factors.items():
        assert pair.A.dtype == pair.B.dtype == dtype
        assert torch.equal(pair.A, saved[f"base_model.model.{module}.lora_A.default.weight"])


def mixed_factors() -> dict[str, LoraFactors]:
    """Different ranks, layers 1 and 11 (one name begins like the other), a head, and a scaling that is not 1."""
    generator = torch.Generator().manual_seed(2)
    shapes = {
        "model.layers.1.self_attn.q_proj": (32, 32, 5),
        "model.layers.11.self_attn.q_proj": (32, 32, 2),
        "model.layers.11.mlp.down_proj": (32, 48, 7),
        "lm_head": (64, 32, 3),
    }
    factors = {
        name: LoraFactors(torch.randn(r, d_in, generator=generator), torch.randn(d_out, r, generator=generator) * 0.1)
        for name, (d_out, d_in, r) in shapes.items()
    }
    head = factors["lm_head"]
    return factors | {"lm_head": LoraFactors(head.A, head.B, 0.5)}


def test_written_folder_is_the_dense_change(tmp_path: Path) -> None:
    factors = mixed_factors()
    write_adapter(tmp_path / "out", factors, base_model="some/base")

    dense = tiny_llama()
    with torch.no_grad():
        for name, pair in factors.items():
            dense.get_submodule(name).weight += pair.delta()
        expected = dense(TOKENS).logits
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # PEFT warns about missing keys and unmatched patterns
            loaded = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "out")
        found = loaded(TOKENS).logits
        base = tiny_llama()(TOKENS).logits

    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (found - base).abs().max() > 0.01  # the adapter does something, so the comparison means something
    assert set(peft_deltas(loaded)) == set(factors)


def test_written_folder_has_scaling_one(tmp_path: Path) -> None:
    write_adapter(tmp_path / "out", mixed_factors(), base_model=None)
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 7
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert config["rank_pattern"][r"^model\.layers\.1\.self_attn\.q_proj$"] == 5
    assert {pair.scaling for pair in read_adapter(tmp_path / "out").factors.values()} == {1.0}
