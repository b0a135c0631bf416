# SPDX-License-Identifier: Apache-2.0
"""The hash that is taken while an artifact is served is the one that the merge would have reported."""

from __future__ import annotations

import pytest
import torch

from vllm_merge.adapters.factors import LoraFactors
from vllm_merge.artifact import MergedAdapter, MergeReport
from vllm_merge.serving.memory import hasher as hasher_module
from vllm_merge.serving.memory.hasher import Hasher
from vllm_merge.serving.memory.residency import ResidentArtifact
from vllm_merge.serving.memory.slots import flat_copy

SHAPES = {"layers.10.q_proj": (3, 70, 33), "layers.2.q_proj": (1, 5, 5), "layers.2.down_proj": (8, 130, 64)}


def resident(device: str, dtype: torch.dtype) -> tuple[ResidentArtifact, str]:
    """An artifact on a device, and the hash of the same factors as a merge's result."""
    generator = torch.Generator().manual_seed(0)
    pairs = {
        module: (torch.randn(rank, d_in, generator=generator), torch.randn(d_out, rank, generator=generator))
        for module, (rank, d_out, d_in) in SHAPES.items()
    }
    storage, factors = flat_copy(pairs, torch.device(device), dtype)
    merged = MergedAdapter(
        "m", {module: LoraFactors(a, b) for module, (a, b) in factors.items()}, MergeReport("none", "core"), {}
    )
    return ResidentArtifact("0" * 64, "m", storage, factors, None, None, 0.0), merged.tensors_sha256


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("chunk", [16, 1000, 16 << 20])
def test_it_is_the_merged_adapters_hash(dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In several chunks, the last of them shorter, as in one."""
    monkeypatch.setattr(hasher_module, "PIECE_BYTES", chunk)
    artifact, expected = resident("cpu", dtype)
    hasher = Hasher(torch.device("cpu"))
    assert hasher.tensors_sha256(artifact) == expected
    assert hasher.tensors_sha256(artifact) == expected, "nothing is left of the one before"


def test_every_element_name_and_shape_enters_it() -> None:
    artifact, expected = resident("cpu", torch.float32)
    hasher = Hasher(torch.device("cpu"))
    for module, pair in artifact.factors.items():
        for tensor in pair:
            before = tensor[-1, -1].clone()
            tensor[-1, -1] += 1
            assert hasher.tensors_sha256(artifact) != expected
            tensor[-1, -1] = before
        assert hasher.tensors_sha256(artifact) == expected
        renamed = {module + "x" if name == module else name: both for name, both in artifact.factors.items()}
        other = ResidentArtifact("0" * 64, "m", artifact.storage, renamed, None, None, 0.0)
        assert hasher.tensors_sha256(other) != expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hasher_module, "PIECE_BYTES", 1000)
    artifact, expected = resident("cuda", dtype)
    assert Hasher(torch.device("cuda")).tensors_sha256(artifact) == expected
