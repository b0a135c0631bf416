# SPDX-License-Identifier: Apache-2.0
"""OSRM: start a LoRA in the directions that the inputs of the other tasks use least (ACL 2025, arXiv:2505.22934).

With H (k, d_in) the inputs of a module on samples of all other tasks, minimise ‖A Hᵀ‖_F subject to A Aᵀ = I. The rows of
A are the eigenvectors of S = HᵀH / (k − 1) with the r smallest eigenvalues; B = 0. That is the variant `covariance`, as
the paper has it. Its code has one row in H for each other task, the mean of the task's inputs: the variant `mean`.
Where more directions than r are not used at all, any r of them will do; a seeded rotation picks some.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vllm_merge.adapters.factors import LoraFactors
from vllm_merge.errors import MergeError, UserInputError

Variant = Literal["covariance", "mean"]
UNUSED = 1e-12  # of the largest eigenvalue: a direction no input uses


@dataclass
class Moments:
    """Of the inputs x of a module, row by row: how many, Σ x (d_in,) and Σ x xᵀ (d_in, d_in), float64."""

    count: int
    total: Tensor
    second: Tensor

    @classmethod
    def zero(cls, width: int, device: torch.device) -> Moments:
        """Of no inputs yet."""
        zeros = torch.zeros(width, width, dtype=torch.float64, device=device)
        return cls(0, zeros.new_zeros(width), zeros)

    @classmethod
    def sum(cls, parts: Iterable[Moments]) -> Moments:
        """Of all inputs of all parts, of which there is one at least."""
        first, *others = parts
        found = cls(first.count, first.total.clone(), first.second.clone())
        for part in others:
            found.count += part.count
            found.total += part.total
            found.second += part.second
        return found

    def add(self, rows: Tensor) -> None:
        """Count in more inputs, (k, d_in), any floating dtype."""
        rows = rows.to(torch.float64)
        self.count += len(rows)
        self.total += rows.sum(0)
        self.second.addmm_(rows.mT, rows)

    def seen_by(self, directions: Tensor) -> float:
        """Share of the inputs' energy that the orthonormal rows (r, d_in) let through, over r / d_in, the share that
        random ones let through: 0 for none, 1 for as much as random directions."""
        rank, width = directions.shape
        energy = self.second.trace()
        if energy <= 0:
            return 0.0
        wide = directions.to(self.second)
        return float(((wide @ self.second) * wide).sum() / energy * width / rank)


def osrm_init(others: Mapping[str, Moments], rank: int, variant: Variant = "covariance", seed: int = 0) -> Tensor:
    """A (rank, d_in) float32 with orthonormal rows, for a task whose other tasks' inputs have these moments.

    Raises UserInputError for a rank above d_in, or without other tasks; MergeError where an input was not finite.
    """
    if not others:
        raise UserInputError("OSRM keeps a task out of the way of others: it needs samples of at least one other task")
    width = next(iter(others.values())).total.numel()
    if rank > width:
        raise UserInputError(f"rank {rank} is above the {width} inputs of the module; choose one of at most {width}")
    if not all(bool(moments.second.isfinite().all()) for moments in others.values()):
        raise MergeError("an input of the module is not finite; does the model work in this dtype?")
    generator = torch.Generator().manual_seed(seed)
    if variant == "mean":
        means = torch.stack([moments.total / max(moments.count, 1) for moments in others.values()])
        return _unused_by(means, rank, generator)
    every = Moments.sum(others.values())
    return _least_used(every.second / max(every.count - 1, 1), rank, generator)


def projected(factors: LoraFactors, directions: Tensor) -> tuple[LoraFactors, float]:
    """OSRM after training, which is lossy: Ã = directions (r, d_in), B̃ = ΔW · pinv(Ã), and the share of ‖ΔW‖²_F kept.

    The rows of Ã are orthonormal, so pinv(Ã) = Ãᵀ, and ΔW Ãᵀ Ã is what is left of ΔW: its part on those directions.
    """
    wide = directions.to(factors.A.device, torch.float64)
    a, b = factors.A.double(), factors.B.double() * factors.scaling
    kept = LoraFactors(wide.float(), (b @ (a @ wide.mT)).float())
    before = float(((b.mT @ b) * (a @ a.mT)).sum())
    return kept, float(kept.B.double().square().sum()) / before if before > 0 else 1.0


def _least_used(second: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """Eigenvectors of the smallest eigenvalues, as rows; of an empty space larger than the rank a seeded part."""
    values, vectors = torch.linalg.eigh(second)
    empty = int((values <= UNUSED * values[-1].clamp_min(0)).sum())
    if empty <= rank:
        least: Tensor = vectors[:, :rank]
    else:
        turn, _ = torch.linalg.qr(torch.randn(empty, rank, dtype=torch.float64, generator=generator))
        least = vectors[:, :empty] @ turn.to(vectors)
    return least.mT.float().contiguous()


def _unused_by(rows: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """Orthonormal directions at right angles to a few rows (k, d_in); as near as can be where d_in − k < rank."""
    _, sizes, basis = torch.linalg.svd(rows, full_matrices=False)
    basis = basis[sizes > UNUSED**0.5 * sizes[0]]
    width = rows.shape[1]
    if rank > width - len(basis):  # few inputs or a large rank: the eigenvectors give the least of what there is
        return _least_used(rows.mT @ rows, rank, generator)
    start = torch.randn(width, rank, dtype=torch.float64, generator=generator).to(rows)
    for _ in range(2):  # the second time takes out what rounding left
        start = start - basis.mT @ (basis @ start)
        start, _ = torch.linalg.qr(start)
    return start.mT.float().contiguous()
