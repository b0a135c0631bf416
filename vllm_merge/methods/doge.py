# SPDX-License-Identifier: Apache-2.0
"""DOGE: adaptive projective gradient descent (Wei et al., ICML 2025, arXiv:2501.01230).

With λ_i = c · w_i / ‖ΔW_i‖_F and Λ = Σ λ_i, a common correction Δ is sought that brings the merged update near every task,
    L(Δ) = Σ_j Σ_o ⟨ΔW_j[o], ΔW_j[o] − Σ_i λ_i ΔW_i[o] − Λ Δ[o]⟩²        (rows o; or one inner product per module),
moving only outside the subspace that the tasks share, Δ ← Δ − η (I − P) ∇L, and ΔW = Σ_j λ_j (ΔW_j + Δ).
∇L = −2Λ Σ_j diag(c_j) B_j A_j: by plain descent Δ = H A keeps the rank ≤ Σ r_i (space core, the steps run on d_out × K).
Adam, and the mask of each task's largest entries, are entrywise: space delta, as in the authors' code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from vllm_merge.adapters.factors import Adapter
from vllm_merge.adapters.stacking import Stack
from vllm_merge.algebra.bases import gram
from vllm_merge.algebra.coordinates import owner_matrix, task_norms
from vllm_merge.algebra.shared_subspace import shared_subspace
from vllm_merge.algebra.tiles import Passes, Tile
from vllm_merge.errors import UserInputError
from vllm_merge.methods.markers import PerAdapter
from vllm_merge.methods.preconditions import Context, change_stacks
from vllm_merge.methods.registry import merge_method
from vllm_merge.methods.resolve import ResolvedParameters
from vllm_merge.methods.ties import TiesStatistics

_BETAS, _EPSILON = (0.9, 0.999), 1e-8  # of Adam
_STATE_BYTES = 16  # Adam: three float32 per entry, and what a step needs
_STRIP_ENTRIES = 1 << 22


@dataclass(frozen=True, slots=True)
class Correction:
    """The problem of a batch of modules. b: (modules, d_out, K) float64; gram_a: A Aᵀ; owner: (n, K).

    coefficients: λ_i, (modules, n); residual: (ΔW_j − Σ λ_i ΔW_i) Aᵀ at the columns of task j, (modules, d_out, K);
    shared: orthonormal columns.
    """

    b: Tensor
    gram_a: Tensor
    owner: Tensor
    coefficients: Tensor
    residual: Tensor
    shared: Tensor
    by_rows: bool

    @classmethod
    def of(
        cls,
        a: Tensor,
        b: Tensor,
        slots: Sequence[slice],
        weight: Tensor,
        *,
        loss: str,
        subspace: int,
        coefficient: float,
    ) -> Correction:
        """a: (modules, K, d_in), b: (modules, d_out, K), of task i at slots[i]; weight: (modules, n)."""
        b = b.double()
        gram_a, gram_b = gram(a.mT), gram(b)
        norms = task_norms(gram_a, gram_b, slots)
        coefficients = torch.where(norms > 0, coefficient * weight / norms, 0.0)
        owner = owner_matrix(slots).to(b).mT.contiguous()
        own = b @ (gram_a * (owner.mT @ owner))
        residual = own - (b * (coefficients @ owner)[:, None]) @ gram_a
        shared = shared_subspace(b, gram_a, slots, a.shape[2], subspace)
        return cls(b, gram_a, owner, coefficients, residual, shared, loss == "rows")

    @property
    def total(self) -> Tensor:
        """Λ, (modules, 1, 1)."""
        return self.coefficients.sum(1)[:, None, None]

    def downhill(self, moved: Tensor) -> Tensor:
        """G with −(I − P) ∇L = G A, (modules, d_out, K), from Δ Aᵀ (modules, d_out, K)."""
        errors = (self.b * (self.residual - self.total * moved)) @ self.owner.mT
        if not self.by_rows:
            errors = errors.sum(1, keepdim=True)
        slope = 2 * self.total * (errors @ self.owner) * self.b
        return slope - self.shared @ (self.shared.mT @ slope)

    def descended(self, steps: int) -> Tensor:
        """H with Δ = H A after plain descent from 0, in steps of 1 / (bound on the curvature)."""
        squares = (self.b * (self.b @ (self.gram_a * (self.owner.mT @ self.owner)))).sum(2)
        largest = squares.amax(1) if self.by_rows else squares.sum(1)
        curvature = 2 * self.total.square() * largest[:, None, None]
        size = torch.where(curvature > 0, 1 / curvature, 0.0)
        h = torch.zeros_like(self.b)
        for _ in range(steps):
            h = h + size * self.downhill(h @ self.gram_a)
        return h

    def adam(self, a: Tensor, steps: int, rate: float) -> Tensor:
        """Δ, (modules, d_out, d_in) float32, after Adam from 0."""
        delta = a.new_zeros(self.b.shape[0], self.b.shape[1], a.shape[2])
        mean, square = torch.zeros_like(delta), torch.zeros_like(delta)
        width = max(1, _STRIP_ENTRIES // (delta.shape[0] * delta.shape[1]))
        for step in range(1, steps + 1):
            downhill = self.downhill((delta @ a.mT).double()).to(a.dtype)
            size, spread = rate / (1 - _BETAS[0] ** step), 1 - _BETAS[1] ** step
            for start in range(0, a.shape[2], width):
                strip = slice(start, start + width)
                slope = downhill @ a[:, :, strip]
                mean[:, :, strip].lerp_(slope, 1 - _BETAS[0])
                square[:, :, strip].mul_(_BETAS[1]).addcmul_(slope, slope, value=1 - _BETAS[1])
                scale = (square[:, :, strip] / spread).sqrt_().add_(_EPSILON)
                delta[:, :, strip].addcdiv_(mean[:, :, strip], scale, value=size)
        return delta


class DogeStatistics:
    """What space delta needs: each task's threshold over the whole model, and the corrections of the modules at hand."""

    def __init__(
        self,
        passes: Passes,
        *,
        loss: str,
        subspace: int,
        coefficient: float,
        steps: int,
        learning_rate: float,
    ) -> None:
        self._passes = passes
        self._problem = {"loss": loss, "subspace": subspace, "coefficient": coefficient}
        self._steps, self._rate = steps, learning_rate
        self._solved: tuple[slice, Tensor, Tensor] | None = None

    @cached_property
    def threshold(self) -> Tensor:
        """Smallest magnitude that is kept, (all modules, n) float32; as many as TIES keeps."""
        return TiesStatistics(self._passes, trim="global", normalize=False).threshold

    def solved(self, tile: Tile) -> tuple[Tensor, Tensor]:
        """λ_i (modules, n, 1, 1) and Δ (modules, d_out, d_in) of the tile's modules; those of the last call are kept."""
        if self._solved is None or self._solved[0] != tile.modules:
            self._solved = None  # its memory is needed
            weight = tile.parameters["weight"][:, :, 0, 0].double()
            problem = Correction.of(tile.right, tile.left, tile.slots, weight, **self._problem)  # type: ignore[arg-type]
            coefficients = problem.coefficients[:, :, None, None].float()
            self._solved = tile.modules, coefficients, problem.adam(tile.right, self._steps, self._rate)
        return self._solved[1:]


def corrected(
    adapters: Sequence[Adapter], context: Context, space: str, parameters: ResolvedParameters
) -> Sequence[Adapter]:
    """Space core: task j becomes (λ_j B_j + Λ H_j) A_j, so that their sum is the result. Space delta: as they are."""
    given = parameters.per_recipe
    if space == "delta":
        _check_sizes(adapters, context)
        return adapters

    def change(stack: Stack) -> tuple[Tensor, Tensor]:
        weight = parameters.tensors(stack.group.modules, context.device)["weight"]
        problem = Correction.of(
            stack.A,
            stack.B,
            stack.group.slots,
            weight,
            loss=given["loss"],
            subspace=given["subspace"],
            coefficient=given["coefficient"],
        )
        scaled = problem.b * (problem.coefficients @ problem.owner)[:, None]
        return stack.A, scaled + problem.total * problem.descended(given["steps"])

    changed = change_stacks(adapters, context, change, arrays=12)
    return [Adapter(adapter.name, factors) for adapter, factors in zip(adapters, changed, strict=True)]


def _check_sizes(adapters: Sequence[Adapter], context: Context) -> None:
    for adapter in adapters:
        for module, factors in adapter.factors.items():
            d_out, d_in = factors.shape
            if (needed := _STATE_BYTES * d_out * d_in) > context.workspace_bytes:
                raise UserInputError(
                    f"merge method 'doge' in space 'delta': module '{module}' ({d_out} × {d_in}) needs "
                    f"{needed / 2**30:.1f} GiB for Adam, and the workspace is {context.workspace_bytes / 2**30:.1f} GiB; "
                    "use space 'core' or a larger workspace"
                )


@merge_method(
    "doge",
    spaces=("core", "delta"),
    reference="arXiv:2501.01230",
    statistics=DogeStatistics,
    prepare=corrected,
    iterative=True,
)
def doge(
    tile: Tile,
    statistics: DogeStatistics,
    *,
    weight: Annotated[Tensor, PerAdapter(1.0)],
    density: Annotated[Tensor, PerAdapter(0.3), Gt(0), Le(1)],
    loss: Literal["rows", "matrix"] = "rows",
    subspace: Annotated[int, Ge(1)] = 6,
    coefficient: Annotated[float, Gt(0)] = 0.07,
    steps: Annotated[int, Ge(1)] = 400,
    learning_rate: Annotated[float, Gt(0)] = 1e-4,
) -> Tensor:
    """Sum the tasks at equal norms, plus a correction found by descent outside the subspace they share.

    coefficient: c of λ_i = c · w_i / ‖ΔW_i‖_F. loss: inner products by row, as the code has it, or of whole modules, as the
    paper writes. subspace: the shared one has a 1/subspace of the directions. steps: of descent (core) or Adam (delta).
    learning_rate (Adam's) and density (share of each task's entries that is kept, over the whole model) are of space
    delta alone.
    """
    if tile.space == "core":
        return tile.values.sum(1)
    coefficients, delta = statistics.solved(tile)
    kept = tile.values.abs() >= statistics.threshold[tile.modules][:, :, None, None]
    return (coefficients * kept * (tile.values + delta[:, None, tile.rows, tile.cols])).sum(1)
