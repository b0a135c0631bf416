# SPDX-License-Identifier: Apache-2.0
"""Linear combinations whose coefficients differ by row or by column of ΔW: Σ_i diag(c_i) B_i A_i, or Σ_i B_i A_i diag(c_i).

They keep the rank within Σ r_i, because each task's factors are scaled line by line, and need no dense matrix:
⟨ΔW_i[o], ΔW_j[o]⟩ = B_i[o] (A_i A_jᵀ) B_j[o]ᵀ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from vllm_merge.adapters.factors import Adapter
from vllm_merge.adapters.stacking import Stack
from vllm_merge.algebra.bases import gram
from vllm_merge.methods.preconditions import Context, change_stacks

By = Literal["module", "row", "column"]
ROUNDING = 1e-14  # of squared norms: a line within it of zero is zero


def line_grams(outer: Tensor, inner: Tensor, slots: Sequence[slice]) -> Tensor:
    """Inner products of the tasks' lines, (modules, lines, n, n) float64, symmetric, a zero line's exactly 0.

    outer: (modules, lines, K), the factor that has the lines; inner: (modules, K, K), the other factor's Gram matrix.
    """
    bounds = torch.stack(
        [(outer[:, :, slot].abs() @ inner.diagonal(dim1=-2, dim2=-1)[:, slot, None].sqrt())[..., 0] for slot in slots],
        dim=-1,
    )
    found = []
    for slot in slots:
        products = (outer[:, :, slot] @ inner[:, slot]) * outer
        found.append(torch.stack([products[:, :, other].sum(-1) for other in slots], dim=-1))
    grams = torch.stack(found, dim=-2)
    squares = grams.diagonal(dim1=-2, dim2=-1)
    there = squares > ROUNDING * bounds.square()
    return grams * there[..., :, None] * there[..., None, :]


def scaled_by_line(
    adapters: Sequence[Adapter],
    context: Context,
    by: Literal["row", "column"],
    coefficients: Callable[[Tensor, Stack], Tensor],
) -> list[Adapter]:
    """The adapters with every row or column of ΔW_i times its coefficient, so that their sum is the merged change.

    coefficients: the lines' Gram matrices (modules, lines, n, n) and the stack → (modules, lines, n).
    """

    def change(stack: Stack) -> tuple[Tensor, Tensor]:
        a, b = stack.A.double(), stack.B.double()
        outer, inner = (b, gram(a.mT)) if by == "row" else (a.mT, gram(b))
        slots = stack.group.slots
        factors = coefficients(line_grams(outer, inner, slots), stack)
        scaled = torch.cat([outer[:, :, slot] * factors[..., i, None] for i, slot in enumerate(slots)], dim=-1)
        return (a, scaled) if by == "row" else (scaled.mT, b)

    changed = change_stacks(adapters, context, change, arrays=8 + 2 * len(adapters))
    return [
        Adapter(adapter.name, factors, content_hash=adapter.known_hash)
        for adapter, factors in zip(adapters, changed, strict=True)
    ]
