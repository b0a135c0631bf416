# SPDX-License-Identifier: Apache-2.0
"""The GPU's way to eigenvectors: refinement on the CPU, the whole of it where there is a GPU."""

import pytest
import torch

from vllm_merge.algebra.symmetric import descending_eigh, from_approximation, refined

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def matrices(kind: str, batch: int = 6, size: int = 40) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    rank = size // 2 if kind == "rank-deficient" else size
    x = torch.randn(batch, size, rank, generator=generator, dtype=torch.float64)
    if kind == "graded":
        x = x * torch.logspace(0, -4, rank, dtype=torch.float64)
    if kind == "tiny":
        x = x * 1e-12
    if kind == "copies":
        x[:, :, size // 2 :] = x[:, :, : size // 2]
    if kind == "one zero":
        x[0] = 0
    return x @ x.mT


KINDS = ["plain", "rank-deficient", "graded", "tiny", "copies", "one zero"]


def check(given: torch.Tensor, values: torch.Tensor, vectors: torch.Tensor) -> None:
    scale = given.diagonal(dim1=-2, dim2=-1).amax(-1).clamp_min(1e-300)[:, None, None]
    rebuilt = vectors * values[:, None, :] @ vectors.mT
    assert ((rebuilt - given) / scale).abs().max() < 1e-10
    assert (
        vectors.mT @ vectors - torch.eye(given.shape[-1], dtype=given.dtype, device=given.device)
    ).abs().max() < 1e-9
    assert (values.diff(dim=-1) <= 0).all()
    exact = torch.linalg.eigvalsh(given).clamp_min(0).flip(-1)
    assert ((values - exact) / scale[:, :, 0]).abs().max() < 1e-12


def scaled(kind: str) -> torch.Tensor:
    given = matrices(kind)
    return given / given.diagonal(dim1=-2, dim2=-1).amax(-1).clamp_min(1e-300)[:, None, None]


@pytest.mark.parametrize("kind", ["plain", "graded"])
def test_two_steps_take_approximate_vectors_to_float64_accuracy(kind):
    given = scaled(kind)
    noise = torch.randn(given.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    vectors = torch.linalg.eigh(given)[1] + 1e-8 * noise
    before = vectors.mT @ given @ vectors
    for _ in range(2):
        vectors = refined(given, vectors)
    after = vectors.mT @ given @ vectors
    assert off_diagonal(before) > 1e-8
    assert off_diagonal(after) < 1e-13


@pytest.mark.parametrize("approximation", ["close", "float32", "wrong", "nan"])
@pytest.mark.parametrize("kind", KINDS)
def test_whatever_the_approximation_the_result_is_right(kind, approximation):
    given = scaled(kind)
    noise = torch.randn(given.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start = {
        "close": torch.linalg.eigh(given)[1] + 1e-8 * noise,
        "float32": torch.linalg.eigh(given.float())[1].double(),
        "wrong": noise,
        "nan": torch.full_like(noise, float("nan")),
    }[approximation]
    values, vectors = from_approximation(given, start)
    check(given, values.clamp_min(0), vectors)


def off_diagonal(square: torch.Tensor) -> float:
    return float((square - torch.diag_embed(square.diagonal(dim1=-2, dim2=-1))).abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_descending_eigh(kind):
    given = matrices(kind)
    check(given, *descending_eigh(given))


@pytest.mark.parametrize("size", [40, 128])
@pytest.mark.parametrize("kind", [pytest.param(kind, marks=GPU) for kind in KINDS])
def test_descending_eigh_on_a_gpu(kind, size):
    given = matrices(kind, batch=5, size=size).cuda()
    check(given, *descending_eigh(given))
