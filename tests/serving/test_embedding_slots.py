# SPDX-License-Identifier: Apache-2.0
"""An embedding's LoRA in vLLM's own layers: slots, what does not fit, rows without an adapter. No server, no model."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.lora.layers import VocabParallelEmbeddingWithLoRA
from vllm.lora.ops.torch_ops import lora_ops
from vllm.lora.punica_wrapper import punica_cpu

from vllm_merge.serving import compat
from vllm_merge.serving.memory.slots import SlotLayout, flat_copy

TOKENS, FEATURES, RANK, SLOTS = 40, 16, 8, 3
EMBED = "model.embed_tokens"


class Embedding(torch.nn.Module):
    """What VocabParallelEmbeddingWithLoRA asks of the layer that it wraps."""

    def __init__(self):
        super().__init__()
        self.org_vocab_size, self.embedding_dim = TOKENS, FEATURES
        self.weight = torch.nn.Parameter(torch.zeros(TOKENS, FEATURES))


@pytest.fixture
def layer():
    config = SimpleNamespace(max_lora_rank=RANK, lora_dtype=torch.float32)
    layer = VocabParallelEmbeddingWithLoRA(Embedding())
    layer.create_lora_weights(SLOTS, config)
    for stacked in (layer.lora_a_stacked, layer.lora_b_stacked):
        stacked.fill_(7.0)
    return layer


@pytest.fixture
def manager(layer):
    model = torch.nn.Module()
    model.model = torch.nn.Module()
    model.model.embed_tokens = layer
    adapters = SimpleNamespace(
        modules={EMBED: layer},
        packed_modules={},
        packed_modules_mapping={},
        model=model,
        vocab_size=TOKENS,
        supported_lora_modules=["embed_tokens"],
    )
    config = SimpleNamespace(max_lora_rank=RANK, lora_dtype=torch.float32)
    return SimpleNamespace(_adapter_manager=adapters, lora_config=config, vocab_size=TOKENS)


def factors(rank: int = 5, tokens: int = TOKENS, features: int = FEATURES):
    generator = torch.Generator().manual_seed(rank)
    pair = torch.randn(rank, tokens, generator=generator), torch.randn(features, rank, generator=generator)
    return {EMBED: pair}


def test_our_slot_is_vllms_slot(manager, layer):
    buffers = compat.slot_buffers(manager)
    assert [(buffer.module, buffer.letter, buffer.shape) for buffer in buffers] == [
        (EMBED, "A", (TOKENS, RANK)),
        (EMBED, "B", (FEATURES, RANK)),
    ]
    layout = SlotLayout(buffers)
    storage, flat = flat_copy(factors(), torch.device("cpu"), torch.float32)
    views = compat.slot_views(manager, layout.buffers, flat)
    layout.fill(1, layout.source(views))
    ours = layer.lora_a_stacked.clone(), layer.lora_b_stacked.clone()
    assert all((stacked[[0, 2]] == 7).all() for stacked in ours), "no other slot was touched"
    layer.set_lora(1, *factors()[EMBED])
    assert torch.equal(ours[0], layer.lora_a_stacked)
    assert torch.equal(ours[1], layer.lora_b_stacked)
    assert storage.data_ptr() not in {view.data_ptr() for view in views[:1]}, "A is a copy, with a row for each token"


def test_vllm_fills_the_same_slot_by_itself(manager, layer):
    """What it is given where our layout does not know a model's layers, by PEFT's names for embeddings."""
    model = compat.lora_model(manager, 1, factors())
    weights = model.loras[EMBED]
    layer.set_lora(1, weights.lora_a, weights.lora_b)
    theirs = layer.lora_a_stacked.clone(), layer.lora_b_stacked.clone()
    layout = SlotLayout(compat.slot_buffers(manager))
    layout.fill(1, layout.source(compat.slot_views(manager, layout.buffers, factors())))
    assert torch.equal(layer.lora_a_stacked, theirs[0])
    assert torch.equal(layer.lora_b_stacked, theirs[1])
    with pytest.raises(RuntimeError, match="embedding LoRA size"):  # vLLM's own check is on its way too
        compat.lora_model(manager, 1, factors(tokens=41))


def test_a_slot_of_an_artifact_without_embeddings_is_cleared(manager, layer):
    layout = SlotLayout(compat.slot_buffers(manager))
    layout.fill(2, layout.source(compat.slot_views(manager, layout.buffers, {})))
    assert not layer.lora_a_stacked[2].any()
    assert not layer.lora_b_stacked[2].any()


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (factors(), None),
        (
            factors(tokens=41),
            "model.embed_tokens: it embeds 41 tokens in 16 features, but the base model's layer 40 in 16. The adapter was "
            "trained on a model with another vocabulary or width.",
        ),
        (
            factors(features=17),
            "model.embed_tokens: it embeds 40 tokens in 17 features, but the base model's layer 40 in 16. The adapter was "
            "trained on a model with another vocabulary or width.",
        ),
        (
            factors(rank=9),
            "model.embed_tokens has rank 9, but this server was started with --max-lora-rank 8. Restart it with a higher "
            "one, or give the recipe `rank: auto` or a rank that fits.",
        ),
    ],
)
def test_what_does_not_fit_is_said_before_a_slot_is_filled(manager, given, reason):
    assert compat.misfits(manager, given) == ([] if reason is None else [reason])


@pytest.mark.parametrize(("head", "kind"), [(False, "an embedding"), (True, "the model's head")])
def test_a_model_whose_embedding_vllm_takes_no_lora_for(manager, monkeypatch, head, kind):
    from vllm.model_executor.layers import vocab_parallel_embedding as layers

    def plain(self):
        torch.nn.Module.__init__(self)

    monkeypatch.setattr(layers.VocabParallelEmbedding, "__init__", plain)
    monkeypatch.setattr(layers.ParallelLMHead, "__init__", plain)
    adapters = manager._adapter_manager
    adapters.modules = {}
    adapters.model.model.embed_tokens = layers.ParallelLMHead() if head else layers.VocabParallelEmbedding()
    assert compat.misfits(manager, factors()) == [
        f"model.embed_tokens is {kind}, and vLLM applies no LoRA to it in Module. Leave it out of the merge (a weight of 0 "
        "for `filter: embed_tokens`), or serve a base model into which it is merged."
    ]


def test_rows_of_the_base_model_stay_as_they_are(monkeypatch):
    """Rows without an adapter have the index -1, which the torch kernels take as the last slot."""
    for owner in (lora_ops, punica_cpu):
        for name in ("bgmv_shrink", "bgmv_expand"):
            monkeypatch.setattr(owner, name, getattr(owner, name))  # is put back after the test
    compat.mend_rows_without_lora()
    weights = torch.ones(2, 1, FEATURES, RANK)
    output, indices = torch.zeros(3, FEATURES), torch.tensor([0, -1, 1])
    punica_cpu.bgmv_expand(torch.ones(3, RANK), weights, output, indices, True)
    assert not output[1].any()
    assert (output[[0, 2]] == RANK).all()
    lengths, starts = torch.tensor([2, 1]), torch.tensor([0, 2])
    output = torch.zeros(3, FEATURES)
    punica_cpu.sgmv_expand(torch.ones(3, RANK), weights, output, starts, lengths, torch.tensor([-1, 1]), 2, 2, 3, True)
    assert not output[:2].any()
    assert (output[2] == RANK).all()
