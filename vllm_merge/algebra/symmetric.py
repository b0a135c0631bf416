# SPDX-License-Identifier: Apache-2.0
"""Eigendecomposition of batches of small symmetric matrices.

On a GPU, `torch.linalg.eigh` takes the matrices of a batch one after the other: 0.36 s for 224 matrices of 128 in float64
on an H100, and the approximate batched SVD (`gesvda`) gives up where eigenvalues lie close together, as those of the Gram
matrices of independent adapters do. Up to 128 rows `kernels.tridiagonal` takes them all at once there; beyond, the host's
cores are faster, and leave the GPU to others.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from math import gcd
from typing import TypeVar

import torch
from torch import Tensor

from vllm_merge.kernels import turns

T = TypeVar("T")

LARGEST_AT_ONCE = 128  # rows
LARGEST_ON_HOST = 512  # rows; larger matrices fill the GPU one by one


def descending_eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, clamped at 0, and eigenvectors of positive semi-definite (batch, k, k) matrices, largest first."""
    batch, rows = matrices.shape[:2]
    if matrices.is_cuda and batch > 1 and 0 < rows <= LARGEST_AT_ONCE:
        return _at_once(matrices)
    if matrices.is_cuda and batch > 1 and LARGEST_AT_ONCE < rows <= LARGEST_ON_HOST:
        values, vectors = (part.to(matrices.device) for part in _in_parallel(matrices.cpu()))
    elif matrices.device.type == "cpu" and batch > 1 and torch.get_num_threads() > 1:
        values, vectors = _in_parallel(matrices, torch.get_num_threads())
    else:
        values, vectors = torch.linalg.eigh(matrices)
    return values.clamp_min(0).flip(-1), vectors.flip(-1)


def _in_parallel(matrices: Tensor, most: int | None = None) -> tuple[Tensor, Tensor]:
    """LAPACK takes the matrices of a batch one after the other; the batch is what there is to run in parallel."""
    batch, rows = matrices.shape[:2]
    threads = min(most or _cores(), _cores(), -(-batch // 2))  # waking a thread costs, too
    # The last bits depend on where in a cache line a matrix begins: pieces begin where lines do, as the batch does.
    together = 64 // gcd(64, rows * rows * matrices.itemsize)
    pieces = torch.split(matrices, -(-batch // (threads * together)) * together)
    solved = list(_pool().map(torch.linalg.eigh, pieces))
    values, vectors = (torch.cat(parts) for parts in zip(*solved, strict=True))
    return values, vectors


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def _pool() -> ThreadPoolExecutor:
    """Threads that each use one core: those of a library beneath would multiply with ours."""
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(_cores(), "vllm-merge-eigh", initializer=torch.set_num_threads, initargs=(1,))
    list(pool.map(lambda _: None, range(_cores())))
    torch.set_num_threads(before)
    return pool


def _at_once(matrices: Tensor) -> tuple[Tensor, Tensor]:
    from vllm_merge.kernels import tridiagonal

    wide = matrices.double()
    values, vectors, right = tridiagonal.eigh(wide)
    if _looks.later is not None:
        _looks.later.append(right.all())
    elif not bool(right.all()):
        wrong = right == 0
        again = torch.linalg.eigh(wide[wrong])
        values[wrong], vectors[wrong] = (part.flip(-1) for part in again)
    return values.clamp_min(0).to(matrices.dtype), vectors.to(matrices.dtype)


class _Looks(threading.local):
    later: list[Tensor] | None = None


_looks = _Looks()


def looked_at_once(compute: Callable[[], T]) -> T:
    """What `compute` returns, with one look at its end whether its decompositions on a GPU are right, not one after each: a look
    waits for the GPU, which then waits for what comes next. Where one is not, it is called again, with a look after each.
    """
    if _looks.later is not None:
        return compute()
    _looks.later = []
    try:
        found, told = compute(), _looks.later
    finally:
        _looks.later = None
    return found if not told or bool(torch.stack(told).all()) else compute()


def inverse_cholesky(matrices: Tensor) -> Tensor | None:
    """L⁻¹ of G = L Lᵀ (batch, k, k), float64; None unless every G is far from singular (its condition number at most 1e8)."""
    inverse, regular = inverse_cholesky_each(matrices)
    return inverse if bool(regular.all()) else None


def inverse_cholesky_each(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """L⁻¹ of G = L Lᵀ (batch, k, k), float64, and of which it can be trusted (batch,): see `inverse_cholesky`."""
    factor, failed = torch.linalg.cholesky_ex(matrices)
    turns.between()
    identity = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    inverse = torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False)
    # ‖G⁻¹‖ ≤ ‖L⁻¹‖²_F and ‖G‖ ≤ tr G.
    condition = inverse.square().sum((-1, -2)) * matrices.diagonal(dim1=-2, dim2=-1).sum(-1)
    turns.between()
    return inverse, (failed == 0) & (condition < 1e8)
