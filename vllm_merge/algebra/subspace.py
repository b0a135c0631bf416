# SPDX-License-Identifier: Apache-2.0
"""Leading eigenvectors of matrices that change a little at a time, by subspace iteration from the vectors found before (Saad,
Numerical Methods for Large Eigenvalue Problems, ch. 5): products of matrices, which a GPU does for a whole batch at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TOLERANCE = 1e-9  # of residuals ‖M Y − Y YᵀM Y‖, relative to the largest eigenvalue; what is found is a product better
FAINT = 1e-8  # eigenvalues, relative to the largest, whose vectors the iteration loses in rounding


@dataclass(frozen=True, slots=True)
class Way:
    """`steps` times so many products by M^(2^squarings), with columns made orthonormal after each."""

    squarings: int
    products: int
    steps: int


# Tried in turn. A squaring takes a GPU as long as two or three products.
WAYS = (Way(1, 3, 1), Way(2, 2, 4), Way(3, 2, 12))


def follow(matrices: Tensor, near: Tensor, way: Way, found: Tensor, measured: Tensor) -> None:
    """Write an orthonormal basis of the subspace of the leading eigenvectors into `found`, (batch, K, k).

    matrices: (batch, K, K), positive semi-definite, float64. near: (batch, K, k), orthonormal, the subspace of matrices
    nearby; columns of zeros stay zero. measured: (4, batch), written, what `settled` asks for.
    """
    power = matrices
    for _ in range(way.squarings):
        power = torch.bmm(power, power)
    for step in range(way.steps):
        near = near if step == 0 else _orthonormal(near)
        for _ in range(way.products):
            near = torch.bmm(power, near)
    image = torch.bmm(matrices, near)
    if _has_kernel(near):
        from vllm_merge.kernels.orthonormal import advance

        advance(near, image, found, measured)
        return
    near = _orthonormal(near)
    image = torch.bmm(matrices, near)
    projected = torch.bmm(near.mT, image)
    values = projected.diagonal(dim1=-2, dim2=-1)
    measured[0] = values.sum(-1)
    measured[1] = torch.linalg.matrix_norm(image - near @ projected)
    measured[2] = values.amax(-1)
    measured[3] = torch.where(near.square().sum(1) > 0, values, torch.inf).amin(-1)
    found.copy_(_orthonormal(image))


def settled(measured: Tensor) -> Tensor:
    """Which subspaces are right, of (4, …): for the subspace Y one product before the last, tr YᵀM Y, ‖M Y − Y YᵀM Y‖_F, and
    the largest and the least diagonal entry of YᵀM Y. nan is not right.
    """
    _, away, largest, least = measured.unbind()
    return (largest > 0) & (away <= TOLERANCE * largest) & (least > FAINT * largest)


def _has_kernel(columns: Tensor) -> bool:
    if not columns.is_cuda:
        return False
    from vllm_merge.kernels import orthonormal

    return orthonormal.fits(*columns.shape[1:])


def _orthonormal(columns: Tensor) -> Tensor:
    """Their orthonormal basis, k columns spanning what the first k do; nan where they are dependent."""
    if _has_kernel(columns):
        from vllm_merge.kernels.orthonormal import orthonormalize

        return orthonormalize(columns)
    for _ in range(2):  # once does not suffice where they are nearly dependent
        norms = torch.linalg.vector_norm(columns, dim=1, keepdim=True)
        columns = columns / torch.where(norms > 0, norms, 1.0)
        products = columns.mT @ columns + torch.diag_embed((norms[:, 0] == 0).to(columns))
        factor, failed = torch.linalg.cholesky_ex(products)
        factor = torch.where((failed == 0)[:, None, None], factor, torch.nan)
        columns = torch.linalg.solve_triangular(factor.mT, columns, upper=True, left=False)
    return columns
