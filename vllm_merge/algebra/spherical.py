# SPDX-License-Identifier: Apache-2.0
"""Combinations of tasks on the sphere: everything follows from their inner products.

A Gram matrix G (…, n, n) holds ⟨ΔW_i, ΔW_j⟩, of whole modules, or of one row or column each. Zero tasks have no direction:
they count as orthogonal to all others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Angles:
    """norms: (…, n) and cosines: (…, n, n) float64, with 1 on the diagonal of tasks that are not zero and 0 at zero tasks."""

    norms: Tensor
    cosines: Tensor

    @classmethod
    def of(cls, gram: Tensor) -> Angles:
        """From a Gram matrix whose diagonal is exactly 0 where a task is zero."""
        norms = gram.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
        inverse = torch.where(norms > 0, 1 / norms, 0.0)
        return cls(norms, (inverse[..., :, None] * gram * inverse[..., None, :]).clamp(-1, 1))

    @property
    def inverse(self) -> Tensor:
        """1 / ‖ΔW_i‖, and 0 for a zero task."""
        return torch.where(self.norms > 0, 1 / self.norms, 0.0)


def slerp_coefficients(cosine: Tensor, t: Tensor, straight: Tensor) -> Tensor:
    """sin((1 − t) θ) / sin θ and sin(t θ) / sin θ; 1 − t and t where `straight`, because the arc there is none.

    cosine: cos θ of two tasks; all of one shape (…). Gives (…, 2).
    """
    theta = cosine.acos()
    sine = torch.where(straight, 1.0, theta.sin())
    first = torch.where(straight, 1 - t, ((1 - t) * theta).sin() / sine)
    second = torch.where(straight, t, (t * theta).sin() / sine)
    return torch.stack([first, second], dim=-1)


def length(coefficients: Tensor, cosines: Tensor) -> Tensor:
    """‖Σ c_i ΔW_i / ‖ΔW_i‖‖, (…)."""
    return (coefficients * (cosines @ coefficients[..., None])[..., 0]).sum(-1).clamp_min(0).sqrt()
