# SPDX-License-Identifier: Apache-2.0
"""How many singular values of a result are kept: `auto`, `lossless`, an integer, or a share of the energy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_merge.algebra.bases import TOLERANCE
from vllm_merge.errors import UserInputError


def numerical_rank(eigenvalues: Tensor) -> Tensor:
    """How many of the squared singular values (modules, k), largest first, are not rounding; (modules,) int64."""
    return (eigenvalues > TOLERANCE**2 * eigenvalues[:, :1]).sum(-1)


@dataclass(frozen=True, slots=True)
class RankPolicy:
    """limit: largest rank, None without one; by_sum: the limit is Σ r_i of each module; energy: share of ‖ΔW‖²_F."""

    limit: int | None
    by_sum: bool = False
    energy: float | None = None

    @classmethod
    def parse(cls, rank: int | str | Mapping[str, float], max_rank: int | None) -> RankPolicy:
        """From `auto`, `lossless`, an integer ≥ 1 or {energy: share in (0, 1]}; max_rank bounds each but `lossless`.

        Raises UserInputError for anything else.
        """
        if max_rank is not None and (isinstance(max_rank, bool) or max_rank < 1):
            raise UserInputError(f"max_rank is {max_rank!r}; allowed is an integer ≥ 1")
        if rank == "auto":
            return cls(max_rank, by_sum=max_rank is None)
        if rank == "lossless":
            return cls(None)
        if isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1:
            return cls(rank if max_rank is None else min(rank, max_rank))
        if isinstance(rank, Mapping) and set(rank) == {"energy"}:
            share = rank["energy"]
            if isinstance(share, int | float) and not isinstance(share, bool) and 0 < share <= 1:
                return cls(max_rank, energy=float(share))
        raise UserInputError(
            f"rank is {rank!r}; allowed are 'auto', 'lossless', an integer ≥ 1, or {{energy: x}} with 0 < x ≤ 1"
        )

    def limits(self, rank_sums: Tensor) -> Tensor | None:
        """Largest rank of each module, (modules,) int64, or None. rank_sums: Σ r_i of each module."""
        if self.by_sum:
            return rank_sums
        return None if self.limit is None else torch.full_like(rank_sums, self.limit)

    def choose(self, eigenvalues: Tensor, total: Tensor, rank_sums: Tensor) -> Tensor:
        """The rank of each module, (modules,) int64.

        eigenvalues: (modules, k) squared singular values, largest first; total: (modules,) their sum over all k.
        """
        ranks = numerical_rank(eigenvalues)
        if self.energy is not None:
            short_of = eigenvalues.cumsum(-1) < self.energy * total[:, None]
            ranks = torch.minimum(ranks, short_of.sum(-1) + 1)
        limits = self.limits(rank_sums)
        return ranks if limits is None else torch.minimum(ranks, limits)
