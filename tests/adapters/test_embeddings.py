# SPDX-License-Identifier: Apache-2.0
"""LoRA on an embedding through every merge: a module like another, that stays an embedding until it is written."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from vllm_merge import Adapter, LoraFactors, MergedAdapter, UserInputError, list_methods, load_recipes, merge
from vllm_merge.adapters.peft import hash_adapter, read_adapter, read_shapes
from vllm_merge.methods.registry import default_registry
from vllm_merge.plan_runner import run_plan
from vllm_merge.recipe.plan import make_plan

EMBED, Q, HEAD = "model.embed_tokens", "model.layers.0.self_attn.q_proj", "lm_head"
SHAPES = {EMBED: (16, 40), Q: (16, 16), HEAD: (40, 16)}  # (d_out, d_in); of the embedding (features, tokens)
RANKS = {"a": 3, "b": 3, "c": 3}
METHODS = [(spec.name, space) for spec in list_methods() for space in spec.spaces]


def adapter(name: str, *, embedding: bool = True, without: Sequence[str] = ()) -> Adapter:
    generator = torch.Generator().manual_seed(ord(name))
    factors = {}
    for module, (d_out, d_in) in SHAPES.items():
        a = torch.randn(RANKS[name], d_in, generator=generator)
        b = torch.randn(d_out, RANKS[name], generator=generator)
        if module not in without:
            factors[module] = LoraFactors(a, b, 0.5, embedding and module == EMBED)
    return Adapter(name, factors)


def merged(method: str, space: str, *, embedding: bool, precondition: Sequence[str] = ()) -> MergedAdapter:
    most = default_registry().get(method).most_adapters or 3
    adapters = [adapter(name, embedding=embedding) for name in "abc"[:most]]
    return merge(adapters, merge_method=method, space=space, precondition=precondition, report="brief")


@pytest.mark.parametrize(("method", "space"), METHODS)
def test_every_method_takes_it_as_a_linear_map_of_tokens(method: str, space: str) -> None:
    found, linear = merged(method, space, embedding=True), merged(method, space, embedding=False)
    assert found.tensors_sha256 == linear.tensors_sha256
    assert {module for module, pair in found.factors.items() if pair.embedding} == {EMBED} & set(found.factors)
    assert not any(pair.embedding for pair in linear.factors.values())


@pytest.mark.parametrize("precondition", default_registry().precondition_names())
def test_no_precondition_forgets_it(precondition: str) -> None:
    found = merged("task_arithmetic", "core", embedding=True, precondition=[precondition])
    assert found.factors[EMBED].embedding


def test_the_sum_is_the_dense_sum_and_comes_back_from_its_folder(tmp_path: Path) -> None:
    """One adapter has an embedding alone, one a head and attention, one everything."""
    adapters = [adapter("a", without=(Q, HEAD)), adapter("b", without=(EMBED,)), adapter("c")]
    weights = [1.0, -0.5, 2.0]
    found = merge(adapters, merge_method="task_arithmetic", weights=weights)
    for module in SHAPES:
        pairs = zip(weights, adapters, strict=True)
        dense = sum(weight * a.factors[module].delta() for weight, a in pairs if module in a.factors)
        torch.testing.assert_close(found.delta(module), dense, rtol=1e-5, atol=1e-5)
    found.save_pretrained(tmp_path / "out")
    assert read_shapes(tmp_path / "out").embeddings == {EMBED}
    again = MergedAdapter.from_pretrained(tmp_path / "out")
    assert again.tensors_sha256 == found.tensors_sha256
    assert again.factors[EMBED].embedding
    again.save_pretrained(tmp_path / "again")
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("out", "again")]
    assert files[0] == files[1]


def test_a_recipe_of_stages_and_an_adapter_by_itself(tmp_path: Path) -> None:
    for name in "abc":
        source = merge([adapter(name)], merge_method="task_arithmetic")
        source.save_pretrained(tmp_path / name)
    (tmp_path / "r.yaml").write_text(
        "version: 1\nadapters: {a: {path: ./a}, b: {path: ./b}, c: {path: ./c}}\nrecipes:\n"
        "  first: {merge_method: ties, adapters: [{adapter: a}, {adapter: b}]}\n"
        "  second: {merge_method: linear, adapters: [{adapter: first}, {adapter: c}]}\n"
    )
    file = load_recipes(tmp_path / "r.yaml")
    hashes = {name: hash_adapter(entry.path) for name, entry in file.adapters.items()}
    settings = {"registry": default_registry(), "adapter_hashes": hashes, "base_model_hash": "", "max_rank": 64}
    for name in ("second", "a"):
        result = run_plan(make_plan(file, name, dtype="bfloat16", **settings))
        assert {module for module, pair in result.factors.items() if pair.embedding} == {EMBED}
    torch.testing.assert_close(result.delta(EMBED), adapter("a").factors[EMBED].delta(), rtol=0.02, atol=0.05)


def test_an_embedding_here_and_a_linear_layer_there() -> None:
    with pytest.raises(UserInputError) as caught:
        merge([adapter("a", embedding=False), adapter("b")], merge_method="linear")
    assert str(caught.value) == (
        "module 'model.embed_tokens' is an embedding in adapter 'b' and a linear layer in 'a'; adapters to be merged must "
        "be of the same base model"
    )


def test_another_vocabulary_is_refused_before_anything_is_merged() -> None:
    other = LoraFactors(torch.ones(3, 41), torch.ones(16, 3), embedding=True)
    with pytest.raises(UserInputError) as caught:
        merge([adapter("a"), Adapter("b", {EMBED: other})], merge_method="linear")
    assert str(caught.value).startswith(
        "module 'model.embed_tokens': adapter 'b' has ΔW of shape (16, 41), adapter 'a' of (16, 40)"
    )


def test_folding_the_scaling_keeps_it() -> None:
    pair = adapter("a").factors[EMBED].folded()
    assert (pair.embedding, pair.scaling) == (True, 1.0)


def test_the_hash_is_of_the_numbers(tmp_path: Path) -> None:
    """What is written and read again has the hash that it had."""
    result = merge([adapter("a")], merge_method="task_arithmetic")
    result.save_pretrained(tmp_path / "a")
    assert MergedAdapter.from_pretrained(tmp_path / "a").tensors_sha256 == result.tensors_sha256
    assert read_adapter(tmp_path / "a").factors[EMBED].embedding
