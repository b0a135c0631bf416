# SPDX-License-Identifier: Apache-2.0
"""Eigendecomposition of many small symmetric matrices at once: one-sided Jacobi on a Cholesky factor, a matrix per program.

For positive definite G = L Lᵀ, rotations of pairs of columns make those of L J orthogonal; they are then the eigenvectors,
√λ long (Veselić and Hari, A note on a one-sided Jacobi algorithm, Numer. Math. 56, 1989). A round takes n/2 disjoint pairs,
and n − 1 rounds in the order of a round robin are a sweep. The longer column of a pair is put first (de Rijk, 1989), without
which widely spread eigenvalues take many sweeps.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

SHIFT = 1e-14  # of matrices whose largest entry is 1: it gives the null space a length to be rotated by
ACCEPTED = 1e-11  # off the diagonal of VᵀGV, and of orthonormality
_SWEEPS = 20
_COSINE = 1e-14  # of two columns, at which they are left alone


@triton.jit  # type: ignore[untyped-decorator]
def _orthogonalize(work, swept, sweeps, limit, N: tl.constexpr):  # type: ignore[no-untyped-def]
    columns = work + tl.program_id(0).to(tl.int64) * N * N  # column j is stored as row j
    HALF: tl.constexpr = N // 2
    pair = tl.arange(0, HALF)
    row = tl.arange(0, N)
    largest = tl.full((), 1.0, tl.float32)
    sweep = 0
    while (sweep < sweeps) & (largest > 100 * limit):  # what is left at 100 a sweep has squared
        largest = tl.full((), 0.0, tl.float32)
        for turn in range(N - 1):
            p = tl.where(pair == 0, 0, (pair - 1 + turn) % (N - 1) + 1)
            q = (N - 2 - pair + turn) % (N - 1) + 1
            first = tl.minimum(p, q)
            second = tl.maximum(p, q)
            x = tl.load(columns + first[:, None] * N + row[None, :])
            y = tl.load(columns + second[:, None] * N + row[None, :])
            alpha = tl.sum(x * x, 1)
            beta = tl.sum(y * y, 1)
            gamma = tl.sum(x * y, 1)
            # An angle in float32 does: what it leaves of gamma is 1e-7 of it. The rotation itself is of float64.
            a32 = alpha.to(tl.float32)
            b32 = beta.to(tl.float32)
            g32 = gamma.to(tl.float32)
            cosine = tl.abs(g32) * tl.rsqrt(a32) * tl.rsqrt(b32)
            largest = tl.maximum(largest, tl.max(cosine, 0))
            rotate = cosine > limit
            zeta = (beta - alpha).to(tl.float32) / tl.where(rotate, 2.0 * g32, 1.0)
            tangent = tl.where(zeta >= 0, 1.0, -1.0) / (tl.abs(zeta) + tl.sqrt(1.0 + zeta * zeta))
            swap = a32 - tangent * g32 < b32 + tangent * g32
            tangent = tl.where(rotate, tangent, 0.0).to(tl.float64)
            c = 1.0 / tl.sqrt(1.0 + tangent * tangent)
            s = c * tangent
            to_x = tl.where(swap, second, first)
            to_y = tl.where(swap, first, second)
            tl.debug_barrier()  # every load of the round is done
            tl.store(columns + to_x[:, None] * N + row[None, :], c[:, None] * x - s[:, None] * y)
            tl.store(columns + to_y[:, None] * N + row[None, :], s[:, None] * x + c[:, None] * y)
            tl.debug_barrier()  # and every store, before the next pairs the columns otherwise
        sweep += 1
    tl.store(swept + tl.program_id(0), tl.where(largest <= 100 * limit, sweep, 0))


def eigh(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues (batch, k), eigenvectors (batch, k, k), and whether they converged (batch,); in no order.

    matrices: positive semi-definite (batch, k, k) float64, the largest entry of each about 1.
    """
    batch, k = matrices.shape[:2]
    n = max(4, triton.next_power_of_2(k))
    diagonal = torch.full((n,), SHIFT, dtype=matrices.dtype, device=matrices.device)
    padded = torch.diag_embed(diagonal.expand(batch, n))
    padded[:, :k, :k] += matrices
    factor, failed = torch.linalg.cholesky_ex(padded)
    columns = factor.mT.contiguous()
    swept = torch.empty(batch, dtype=torch.int32, device=matrices.device)
    _orthogonalize[(batch,)](columns, swept, _SWEEPS, _COSINE, N=n, num_warps=max(1, min(16, n * n // 1024)))
    # Columns of padding are orthogonal to all others from the start: they stay what they are, √SHIFT long and last.
    lengths = torch.linalg.vector_norm(columns, dim=-1)
    order = torch.where(columns[:, :, k:].abs().amax(-1) > 0, -1.0, lengths) if n > k else lengths
    kept = order.topk(k, dim=-1).indices
    vectors = (columns / lengths[:, :, None]).gather(1, kept[:, :, None].expand(-1, -1, n))[:, :, :k].mT
    square = vectors.mT @ matrices @ vectors
    values = square.diagonal(dim1=-2, dim2=-1)
    one = torch.eye(k, dtype=matrices.dtype, device=matrices.device)
    away = torch.maximum((square - torch.diag_embed(values)).abs(), (vectors.mT @ vectors - one).abs())
    return values, vectors, (swept > 0) & (failed == 0) & (away.amax((-1, -2)) < ACCEPTED)
