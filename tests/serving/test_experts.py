# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts by their shapes: no model and no GPU, but vLLM's own packing of experts where it is installed."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from vllm_merge import Adapter, LoraFactors, merge
from vllm_merge.adapters.peft import read_adapter
from vllm_merge.serving.worker.experts import projections, whole_experts

HIDDEN, INNER, EXPERTS = 12, 20, 4
LAYER = "model.layers.0.mlp.experts"
GATED = [f"{LAYER}.{i}.{part}" for i in range(EXPERTS) for part in ("gate_proj", "down_proj", "up_proj")]
PLAIN = [f"{LAYER}.{i}.{part}" for i in range(EXPERTS) for part in ("up_proj", "down_proj")]


def pair(part: str, rank: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    d_in, d_out = (INNER, HIDDEN) if part.endswith("down_proj") else (HIDDEN, INNER)
    return torch.randn(rank, d_in, generator=generator), torch.randn(d_out, rank, generator=generator)


SOME = {
    "every expert, ranks apart": {part: 1 + i % 5 for i, part in enumerate(GATED)},
    "one expert": {f"{LAYER}.2.{part}": 3 for part in ("gate_proj", "down_proj", "up_proj")},
    "one projection": {f"{LAYER}.{i}.down_proj": 2 for i in range(EXPERTS)},
    "one of it all": {f"{LAYER}.3.up_proj": 4},
}


@pytest.mark.parametrize("case", SOME)
@pytest.mark.parametrize("parts", [GATED, PLAIN], ids=["gated", "plain"])
def test_all_experts_at_one_rank_and_the_same_change(case, parts):
    given = {part: pair(part, rank, i) for i, (part, rank) in enumerate(SOME[case].items()) if part in parts}
    found = whole_experts(parts, given)
    assert list(found) == parts
    count = projections(parts)
    for index, part in enumerate(parts):
        a, b = found[part]
        assert (a.shape[1], b.shape[0]) == ((INNER, HIDDEN) if part.endswith("down_proj") else (HIDDEN, INNER))
        assert a.shape[0] == b.shape[1] == found[parts[index % count]][0].shape[0]
        before = given[part][1] @ given[part][0] if part in given else torch.zeros(b.shape[0], a.shape[1])
        torch.testing.assert_close(b @ a, before)


def test_a_layer_without_any_stays_without():
    assert whole_experts(GATED, {}) == {}


@pytest.mark.parametrize("case", SOME)
def test_vllm_packs_what_was_filled_up(case):
    weights = pytest.importorskip("vllm.lora.lora_weights", reason="vLLM is not installed")
    given = {part: pair(part, rank, i) for i, (part, rank) in enumerate(SOME[case].items())}
    loras = [
        weights.LoRALayerWeights(part, a.shape[0], a.shape[0], a, b)
        for part, (a, b) in whole_experts(GATED, given).items()
    ]
    packed = weights.PackedLoRALayerWeights.pack_moe(loras, LAYER)
    for slice_, name in enumerate(("gate_proj", "down_proj", "up_proj")):
        a, b = packed.lora_a[slice_], packed.lora_b[slice_]
        for expert in range(EXPERTS):
            part = f"{LAYER}.{expert}.{name}"
            before = given[part][1] @ given[part][0] if part in given else torch.zeros(b.shape[1], a.shape[2])
            torch.testing.assert_close(packed.scaling[slice_] * b[expert] @ a[expert], before)


@pytest.mark.parametrize(
    ("part", "shape", "reason"),
    [
        ("gate_proj", (HIDDEN, INNER), None),
        ("down_proj", (INNER, HIDDEN), None),
        (
            "up_proj",
            (HIDDEN, INNER + 1),
            f"it maps 12 to 21 features, but the base model's layer maps {HIDDEN} to {INNER}",
        ),
        (
            "down_proj",
            (HIDDEN, INNER),
            f"it maps 12 to 20 features, but the base model's layer maps {INNER} to {HIDDEN}",
        ),
    ],
)
def test_what_does_not_fit_an_expert_is_said_on_every_rank(part, shape, reason):
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from vllm.lora.layers import FusedMoEWithLoRA

    from vllm_merge.serving import compat

    layer = FusedMoEWithLoRA.__new__(FusedMoEWithLoRA)
    torch.nn.Module.__init__(layer)
    layer.moe_config = SimpleNamespace(hidden_dim=HIDDEN, intermediate_size_per_partition=INNER // 2)
    layer.tp_size = 2
    manager = SimpleNamespace(modules={LAYER: layer}, packed_modules={LAYER: GATED}, model=torch.nn.Module())
    worker = SimpleNamespace(_adapter_manager=manager, lora_config=SimpleNamespace(max_lora_rank=8))
    module = f"{LAYER}.1.{part}"
    found = compat.misfits(worker, {module: (torch.zeros(2, shape[0]), torch.zeros(shape[1], 2))})
    assert found == [] if reason is None else found[0].startswith(f"{module}: {reason}")


def test_adapters_of_experts_are_merged_and_written_by_their_names(tmp_path):
    """Keys of single experts, as PEFT writes them for models whose experts are modules; one adapter has fewer."""
    for name, parts in (("a", GATED), ("b", GATED[:5])):
        (tmp_path / name).mkdir()
        tensors = {
            f"base_model.model.{part}.lora_{letter}.weight": tensor
            for part in parts
            for letter, tensor in zip("AB", pair(part, 2, ord(name)), strict=True)
        }
        save_file(tensors, tmp_path / name / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["gate_proj"]}
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(config))
    adapters = [Adapter.from_peft(tmp_path / name) for name in "ab"]
    merged = merge(adapters, merge_method="task_arithmetic", weights=[1.0, 0.5])
    for part in GATED:
        factors = [adapter.factors[part] for adapter in adapters if part in adapter.factors]
        dense = sum(weight * f.delta() for weight, f in zip((1.0, 0.5), factors, strict=False))
        torch.testing.assert_close(merged.delta(part), dense, rtol=1e-5, atol=1e-5)
    merged.save_pretrained(tmp_path / "out")
    assert set(load_file(tmp_path / "out" / "adapter_model.safetensors")) == {
        f"base_model.model.{part}.lora_{letter}.weight" for part in GATED for letter in "AB"
    }
    assert isinstance(read_adapter(tmp_path / "out").factors[GATED[0]], LoraFactors)
