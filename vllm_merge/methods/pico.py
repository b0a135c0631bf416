# SPDX-License-Identifier: Apache-2.0
"""Precondition pico: calibrate the output directions that the adapters share (Pico, arXiv:2604.16826)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vllm_merge.adapters.factors import Adapter, LoraFactors
from vllm_merge.adapters.stacking import Stack
from vllm_merge.algebra.bases import gram, orthonormal_basis
from vllm_merge.methods.preconditions import Context, change_stacks, precondition


@precondition("pico")
def pico(adapters: Sequence[Adapter], context: Context) -> list[Mapping[str, LoraFactors]]:
    """B̃_i = (I + U diag(α − 1) Uᵀ) B_i with [B_1 … B_n] = U diag(σ) Vᵀ, α_j = 1 / (1 + (n − 1) σ_j² / Σ σ²).

    n counts the adapters that have the module: where one is alone nothing is shared and nothing changes. The method's
    last step, which gives the merged result the adapters' mean norm, is not a matter of the inputs: λ stands for it.
    """
    return change_stacks(adapters, context, _calibrated)


def _calibrated(stack: Stack) -> tuple[Tensor, Tensor]:
    b = stack.B.double()
    basis = orthonormal_basis(gram(b), min(b.shape[1:]), singular=True)
    energy = basis.R.square().sum(-1)  # σ²: R's rows are orthogonal
    share = energy / energy.sum(-1, keepdim=True).clamp_min(torch.finfo(energy.dtype).tiny)
    there = torch.stack([b[:, :, slot].square().sum((1, 2)) > 0 for slot in stack.group.slots], dim=1)
    alpha = 1 / (1 + (there.sum(1, keepdim=True) - 1).clamp_min(0) * share)
    return stack.A, b + b @ (basis.T @ ((alpha - 1)[:, :, None] * basis.R))
