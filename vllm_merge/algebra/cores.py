# SPDX-License-Identifier: Apache-2.0
"""Tasks of whole modules in space `core`, for methods that need singular vectors rather than entries.

M_i = left_i @ right_i is kept as the product it is: no task is made dense unless a method asks for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from vllm_merge.algebra.coordinates import Coordinates, owner_matrix, owners, task_norms


@dataclass(frozen=True, slots=True)
class Cores:
    """What a method of whole modules is given.

    left: (modules, rows, K), right: (modules, K, cols), float64; task i is left[:, :, slots[i]] @ right[:, slots[i]].
    ranks: (modules, n) int64, r_i, 0 where an adapter lacks the module.
    modules: positions among all modules of the merge. parameters: per-adapter ones, each (modules, n, 1, 1) float64.
    """

    left: Tensor
    right: Tensor
    slots: tuple[slice, ...]
    ranks: Tensor
    modules: slice
    parameters: Mapping[str, Tensor]

    @classmethod
    def of(cls, space: Coordinates, part: slice, start: int, parameters: Mapping[str, Tensor]) -> Cores:
        """Some modules of a batch. start: the position of the batch's first module."""
        group = space.group
        return cls(
            space.left[part],
            space.right[part],
            group.slots,
            group.rank_table[part].to(space.left.device, non_blocking=True),
            slice(start + part.start, start + part.stop),
            parameters,
        )

    @property
    def room(self) -> int:
        """min(rows, cols): as many directions as any ΔW of these has, min(d_out, d_in), or Σ r_i where that is less."""
        return min(self.left.shape[1], self.right.shape[2])

    def task(self, index: int) -> tuple[Tensor, Tensor]:
        """left_i (modules, rows, r) and right_i (modules, r, cols)."""
        return self.left[:, :, self.slots[index]], self.right[:, self.slots[index]]

    def dense(self, index: int) -> Tensor:
        """M_i, (modules, rows, cols)."""
        left, right = self.task(index)
        return left @ right

    def total(self) -> Tensor:
        """Σ M_i, (modules, rows, cols)."""
        return self.left @ self.right

    def norms(self) -> Tensor:
        """‖M_i‖_F = ‖ΔW_i‖_F, (modules, n) float64; exactly 0 where it is within rounding of 0."""
        return task_norms(self.right @ self.right.mT, self.left.mT @ self.left, self.slots)

    def own_grams(self) -> tuple[Tensor, Tensor]:
        """left_iᵀ left_i and right_i right_iᵀ as blocks on the diagonals of (modules, K, K), 0 elsewhere."""
        owner = owners(self.slots).to(self.left.device, non_blocking=True)
        own = owner[:, None] == owner
        return (self.left.mT @ self.left) * own, (self.right @ self.right.mT) * own

    def gram(self) -> Tensor:
        """⟨M_i, M_j⟩ = ⟨ΔW_i, ΔW_j⟩, (modules, n, n) float64; exactly 0 where a task is within rounding of 0."""
        products = (self.left.mT @ self.left) * (self.right @ self.right.mT)
        one = owner_matrix(self.slots).to(self.left, non_blocking=True)
        present = (self.norms() > 0).to(self.left)
        return (one.mT @ products @ one) * present[:, :, None] * present[:, None, :]

    def scaled(self, factors: Tensor) -> Cores:
        """The tasks multiplied by factors, (modules, n) or (modules, n, 1, 1)."""
        columns = factors.flatten(1).to(self.left.dtype)[:, owners(self.slots).to(factors.device, non_blocking=True)]
        return replace(self, left=self.left * columns[:, None, :])
