# SPDX-License-Identifier: Apache-2.0
"""Folders against the real PEFT: what it saves we read exactly, what we write it loads exactly."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from vllm_merge.adapters.factors import LoraFactors  # noqa: E402
from vllm_merge.adapters.peft import read_adapter, read_shapes, write_adapter  # noqa: E402

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
    "embedding": {"r": 3, "lora_alpha": 6, "target_modules": ["embed_tokens", "q_proj"]},
    "embedding_patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["embed_tokens", "q_proj"],
        "use_rslora": True,
        "rank_pattern": {"embed_tokens": 2},
        "alpha_pattern": {"model.embed_tokens": 5},
    },
}
EMBED = "model.embed_tokens"


@pytest.mark.parametrize("case", SOURCES)
def test_read_gives_pefts_delta(case: str, tmp_path: Path) -> None:
    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(**SOURCES[case]))
    fill(model)
    model.save_pretrained(tmp_path)

    adapter = read_adapter(tmp_path, "x")

    expected = peft_deltas(model)
    assert set(adapter.factors) == set(expected)
    for module, delta in expected.items():
        pair = adapter.factors[module]
        assert pair.embedding == (module == EMBED)
        torch.testing.assert_close(pair.delta().mT if pair.embedding else pair.delta(), delta, rtol=1e-6, atol=1e-6)
    assert read_shapes(tmp_path).embeddings == {EMBED} & set(expected)


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
    """Different ranks, layers 1 and 11 (one name begins like the other), a head and an embedding with scalings not 1."""
    generator = torch.Generator().manual_seed(2)
    shapes = {
        "model.layers.1.self_attn.q_proj": (32, 32, 5),
        "model.layers.11.self_attn.q_proj": (32, 32, 2),
        "model.layers.11.mlp.down_proj": (32, 48, 7),
        "lm_head": (64, 32, 3),
        EMBED: (32, 64, 4),
    }
    factors = {
        name: LoraFactors(torch.randn(r, d_in, generator=generator), torch.randn(d_out, r, generator=generator) * 0.1)
        for name, (d_out, d_in, r) in shapes.items()
    }
    head, embed = factors["lm_head"], factors[EMBED]
    return factors | {
        "lm_head": LoraFactors(head.A, head.B, 0.5),
        EMBED: LoraFactors(embed.A, embed.B, 2.0, embedding=True),
    }


def test_written_folder_is_the_dense_change(tmp_path: Path) -> None:
    factors = mixed_factors()
    write_adapter(tmp_path / "out", factors, base_model="some/base")

    dense = tiny_llama()
    with torch.no_grad():
        for name, pair in factors.items():
            dense.get_submodule(name).weight += pair.delta().mT if pair.embedding else pair.delta()
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


def test_what_peft_saves_comes_back_to_peft_the_same(tmp_path: Path) -> None:
    """PEFT writes, we read and write, PEFT loads: the same tensors under the same names, and the same logits."""
    config = peft.LoraConfig(r=3, lora_alpha=3, target_modules=["embed_tokens", "lm_head", "q_proj"])
    model = peft.get_peft_model(tiny_llama(), config)
    fill(model)
    model.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    write_adapter(tmp_path / "ours", read_adapter(tmp_path / "theirs").factors, base_model=None)
    theirs, ours = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours"))
    assert set(ours) == set(theirs)
    assert f"base_model.model.{EMBED}.lora_embedding_A" in ours
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    loaded = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "ours").eval()
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).logits, model.eval()(TOKENS).logits)


def test_a_tied_embedding_changes_alone_as_in_peft(tmp_path: Path) -> None:
    """PEFT's forward pass leaves the head as it is; `ensure_weight_tying` trains and saves one change of both."""
    tied = transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True)

    def base() -> "transformers.LlamaForCausalLM":
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(tied).eval()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the layers are tied
        alone = peft.get_peft_model(base(), peft.LoraConfig(r=3, lora_alpha=6, target_modules=["embed_tokens"]))
        both = peft.get_peft_model(
            base(), peft.LoraConfig(r=3, lora_alpha=6, target_modules=["embed_tokens"], ensure_weight_tying=True)
        )
    for name, model in (("alone", alone), ("both", both)):
        fill(model)
        model.save_pretrained(tmp_path / name)
    adapter, pair = read_adapter(tmp_path / "alone"), read_adapter(tmp_path / "both")
    assert set(adapter.factors) == {EMBED}
    assert set(pair.factors) == {EMBED, "lm_head"}
    torch.testing.assert_close(pair.factors["lm_head"].delta(), pair.factors[EMBED].delta().mT)

    for model, read in ((alone, adapter), (both, pair)):
        separate = base()  # with a head of its own, that only changes where the adapter says so
        separate.lm_head.weight = torch.nn.Parameter(separate.lm_head.weight.detach().clone())
        with torch.no_grad():
            for module, change in read.factors.items():
                delta = change.delta().mT if change.embedding else change.delta()
                separate.get_submodule(module).weight += delta
            torch.testing.assert_close(separate(TOKENS).logits, model.eval()(TOKENS).logits, rtol=1e-4, atol=1e-5)
