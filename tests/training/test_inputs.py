# SPDX-License-Identifier: Apache-2.0
"""The inputs of a model's layers: every token counted once, padding never, in any number of passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vllm_merge import UserInputError
from vllm_merge.training.inputs import Batch, input_moments, target_layers
from vllm_merge.training.starts import osrm_starts

transformers = pytest.importorskip("transformers")
TEXTS = {"one": [[1, 2, 3], [4, 5, 6, 7, 8]], "two": [[9, 3], [2, 2, 7, 1]]}


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=12,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=16,
    )
    return transformers.LlamaForCausalLM(config).eval()


def padded(rows: list[list[int]]) -> Batch:
    width = max(map(len, rows))
    return {
        "input_ids": torch.tensor([row + [0] * (width - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
    }


@pytest.mark.parametrize("limit", [1, 10_000, 1 << 30])
def test_moments_are_those_of_every_token(model: Any, limit: int) -> None:
    layers = target_layers(model, ["q_proj", "v_proj", "down_proj"])
    expected: dict[str, list[torch.Tensor]] = {name: [] for name in layers}
    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs, name=name: expected[name].append(inputs[0][0]))
        for name, layer in layers.items()
    ]
    for rows in TEXTS.values():
        for row in rows:  # one by one, without padding
            model(input_ids=torch.tensor([row]))
    for hook in hooks:
        hook.remove()
    seen: list[str] = []
    calls: list[tuple[int, int]] = []
    batches = {task: [padded(rows)] for task, rows in TEXTS.items()}
    progress = lambda done, total: calls.append((done, total))
    for names, by_task in input_moments(model, layers, batches, moment_bytes=limit, progress=progress):
        seen += names
        every = torch.cat(expected[names[0]]).double()
        assert [by_task[task].count for task in TEXTS] == [8, 6]
        second = by_task["one"].second + by_task["two"].second
        assert torch.allclose(second, every.mT @ every, atol=1e-5)
        assert torch.allclose(by_task["one"].total + by_task["two"].total, every.sum(0), atol=1e-5)
    assert sorted(seen) == sorted(layers)
    assert calls[-1][0] == calls[-1][1] == len(calls)
    assert len(calls) == 2 * (6 if limit == 1 else 1) or limit == 10_000
    if limit == 1 << 30:
        assert not any(layer._forward_pre_hooks for layer in layers.values())


def test_layers_with_one_input_are_counted_once(model: Any) -> None:
    layers = target_layers(model, ["all-linear"])
    assert len(layers) == 14
    batches = {task: [padded(rows)] for task, rows in TEXTS.items()}
    found = [sorted(name.rpartition(".")[2] for name in names) for names, _ in input_moments(model, layers, batches)]
    assert sorted(found) == sorted(
        2 * [["k_proj", "q_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    )


def test_every_task_keeps_away_from_the_others(model: Any) -> None:
    layers = target_layers(model, ["model.layers.0.self_attn.q_proj", "down_proj"])
    batches = {task: [padded(rows)] for task, rows in TEXTS.items()}
    starts = osrm_starts(model, layers, batches, 4)
    assert list(starts) == ["one", "two"]
    for start in starts.values():
        assert {name: tuple(a.shape) for name, a in start.directions.items()} == {
            "model.layers.0.mlp.down_proj": (4, 24),
            "model.layers.0.self_attn.q_proj": (4, 16),
            "model.layers.1.mlp.down_proj": (4, 24),
        }
        for name in start.directions:
            assert start.others[name] < 1e-6 < start.own[name]


def test_refusals(model: Any) -> None:
    with pytest.raises(UserInputError, match=r"--target-modules query: .* it has .*q_proj.* and all-linear means all"):
        target_layers(model, ["q_proj", "query"])
    layers = target_layers(model, ["q_proj"])
    batches = {task: [padded(rows)] for task, rows in TEXTS.items()}
    with pytest.raises(UserInputError, match="two tasks at least"):
        osrm_starts(model, layers, {"one": batches["one"]}, 4)
    with pytest.raises(UserInputError, match="task 'two' has no samples"):
        osrm_starts(model, layers, {**batches, "two": []}, 4)
    with pytest.raises(UserInputError, match=r"--rank 17: .*q_proj has 16 inputs"):
        osrm_starts(model, layers, batches, 17)
    model.unused = torch.nn.Linear(16, 16)
    with pytest.raises(UserInputError, match="unused is not used by every task"):
        osrm_starts(model, target_layers(model, ["unused"]), batches, 4)
    del model.unused
