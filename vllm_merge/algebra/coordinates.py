# SPDX-License-Identifier: Apache-2.0
"""The spaces a merge works in: each represents task i at a module by the entries of left_i @ right_i.

delta: left_i = B_i, right_i = A_i, the dense ΔW_i.
knots: [ΔW_1 … ΔW_n] = U [Z_1 … Z_n], Z_i = (Uᵀ B_i) A_i (KnOTS, arXiv:2410.19735).
core:  ΔW_i = Q_B M_i Q_Aᵀ, M_i = (Q_Bᵀ B_i) (A_i Q_A) (Core Space, arXiv:2509.17786).
The bases come from Gram matrices; no matrix with both d_out and d_in is made here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from vllm_merge.adapters.stacking import ModuleGroup, Stack, rejoined
from vllm_merge.algebra.bases import TOLERANCE, Basis, bases_at_once, gram, orthonormal_basis
from vllm_merge.algebra.symmetric import descending_eigh, inverse_cholesky
from vllm_merge.kernels import turns


@dataclass(frozen=True, slots=True)
class Coordinates:
    """Tasks of a batch of modules in one space.

    left: (modules, rows, K), right: (modules, K, cols), adapter i at slots[i] of K; float32, in `core` float64.
    left_transform, right_transform: (modules, K, rows) or (modules, K, cols) float64. A merged X (rows, cols) means
    ΔW = (B T_left) X (Aᵀ T_right)ᵀ; None where the coordinate is the output or input feature itself.
    entries: (modules,) int64, the number of entries a task has at a module (rows and columns of padding not counted).
    """

    group: ModuleGroup
    left: Tensor
    right: Tensor
    left_transform: Tensor | None
    right_transform: Tensor | None
    entries: Tensor

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(modules, n, rows, cols) of all entries."""
        return self.left.shape[0], len(self.group.slots), self.left.shape[1], self.right.shape[2]

    def values(self, modules: slice, rows: slice, cols: slice, *, made: bool = True) -> Tensor:
        """Entries (modules, n, rows, cols) of a part of the batch, the same bytes at every call; on the meta device unless
        they are to be made."""
        left, right = self.left[modules, rows], self.right[modules, :, cols]
        shape = (left.shape[0], len(self.group.slots), left.shape[1], right.shape[2])
        if not made:
            return torch.empty(shape, dtype=left.dtype, device="meta")
        values = torch.empty(shape, dtype=left.dtype, device=left.device)
        for task, slot in enumerate(self.group.slots):
            torch.matmul(left[:, :, slot], right[:, slot], out=values[:, task])
        return values


@dataclass(frozen=True, slots=True)
class Grams:
    """A Aᵀ and BᵀB of a stack, (modules, K, K) float64, and ‖ΔW_i‖_F, (modules, n) float64."""

    A: Tensor
    B: Tensor
    norms: Tensor

    @classmethod
    def of(cls, stack: Stack, at_a_time: int | None = None) -> Grams:
        """Non-finite factors give non-finite norms; a task within rounding of zero has norm exactly 0.

        at_a_time: of how many modules what it takes is held together, of all without it.
        """
        return cls.of_pairs([gram_pair(stack, at_a_time)], stack.group.slots)

    @classmethod
    def of_pairs(cls, pairs: Sequence[tuple[Tensor, Tensor]], slots: Sequence[slice]) -> Grams:
        """Of all modules of several stacks with the same slots, from the `gram_pair` of each."""
        gram_a, gram_b = pairs[0] if len(pairs) == 1 else map(torch.cat, zip(*pairs, strict=True))
        return cls(gram_a, gram_b, task_norms(gram_a, gram_b, slots))

    def of_some(self, modules: slice) -> Grams:
        """Of some modules."""
        return Grams(self.A[modules], self.B[modules], self.norms[modules])

    @classmethod
    def joined(cls, several: Sequence[Grams]) -> Grams:
        """Those of all modules of several."""
        if len(several) == 1:
            return several[0]
        return cls(*(rejoined([getattr(one, part) for one in several]) for part in ("A", "B", "norms")))


def gram_pair(stack: Stack, at_a_time: int | None = None) -> tuple[Tensor, Tensor]:
    """A Aᵀ and BᵀB of a stack. at_a_time: see `Grams.of`."""
    pair = gram(stack.A.mT, at_a_time), gram(stack.B, at_a_time)
    turns.between()
    return pair


def task_norm(gram_a: Tensor, gram_b: Tensor) -> Tensor:
    """‖ΔW‖_F = √tr(BᵀB AAᵀ) from A Aᵀ and BᵀB (…, r, r); exactly 0 where it is within rounding of 0.

    Not finite where they are not.
    """
    squared = (gram_a * gram_b).sum((-1, -2))
    terms = (gram_a.diagonal(dim1=-2, dim2=-1) * gram_b.diagonal(dim1=-2, dim2=-1)).sqrt()
    rounding = 1e-14 * terms.sum(-1) ** 2
    return torch.where((squared <= rounding) & (rounding < torch.inf), 0.0, squared).sqrt()


def task_norms(gram_a: Tensor, gram_b: Tensor, slots: Sequence[slice]) -> Tensor:
    """`task_norm` of every task, (modules, n), from the Gram matrices (modules, K, K) of all."""
    widths = {slot.stop - slot.start for slot in slots}
    if len(widths) > 1:
        return torch.stack([task_norm(gram_a[:, slot, slot], gram_b[:, slot, slot]) for slot in slots], dim=1)
    n, width = len(slots), widths.pop()  # all at once: a GPU waits for launches here
    blocks = [gram.reshape(-1, n, width, n, width).diagonal(dim1=1, dim2=3) for gram in (gram_a, gram_b)]
    return task_norm(*(block.permute(0, 3, 1, 2) for block in blocks))


@dataclass(frozen=True, slots=True)
class Bases:
    """What Gram matrices alone tell of modules, whatever their shapes: coordinates, but for what is the stack's own.

    left, right, left_transform, right_transform: as those of Coordinates; left or right None where it is B or A itself.
    rows, cols: (modules,) int64, of a task's entries; None where they are d_out or d_in.
    """

    left: Tensor | None
    right: Tensor | None
    left_transform: Tensor | None
    right_transform: Tensor | None
    rows: Tensor | None
    cols: Tensor | None

    @property
    def needs_stack(self) -> bool:
        """Whether coordinates need B or A itself."""
        return self.left is None or self.right is None

    def of(self, modules: slice) -> Bases:
        """Of some of the modules."""
        parts = (self.left, self.right, self.left_transform, self.right_transform, self.rows, self.cols)
        return Bases(*(None if part is None else part[modules] for part in parts))

    def on(self, group: ModuleGroup, stack: Stack | None, entries: Tensor) -> Coordinates:
        """The coordinates of a group. stack: its factors; None if they are not needed. entries: see `entries`."""
        left, right = self.left, self.right
        if stack is not None:
            left = stack.B if left is None else left
            right = stack.A if right is None else right
        assert left is not None
        assert right is not None
        return Coordinates(group, left, right, self.left_transform, self.right_transform, entries)

    def entries(self, group: ModuleGroup, device: torch.device) -> Tensor:
        """How many entries a task of a group has, (modules,) int64."""
        rows, cols = (
            torch.full((len(group.modules),), size, device=device) if counted is None else counted
            for counted, size in zip((self.rows, self.cols), group.shape, strict=True)
        )
        return rows * cols


Build = Callable[[ModuleGroup, Grams, bool], Bases]


def delta_bases(core: ModuleGroup, grams: Grams, singular: bool) -> Bases:
    """The dense entries; nothing to compute."""
    return Bases(None, None, None, None, None, None)


def knots_bases(core: ModuleGroup, grams: Grams, singular: bool) -> Bases:
    """U = left singular vectors of [ΔW_1 … ΔW_n] on its support, largest first.

    With B = Q R, the left singular vectors are Q P for Σ_i R_i (A_i A_iᵀ) R_iᵀ = P s² Pᵀ. The support is that of
    [ΔW_1/‖ΔW_1‖ … ΔW_n/‖ΔW_n‖], so that a small adapter keeps all its directions beside a large one.
    """
    basis = orthonormal_basis(grams.B, core.shape[0])
    owner = owners(core.slots).to(grams.A.device, non_blocking=True)
    blocks = grams.A * (owner[:, None] == owner)
    weight = torch.where(grams.norms > 0, 1 / grams.norms**2, 0.0)[:, owner]
    equal = basis.R @ (blocks * weight[:, None, :]) @ basis.R.mT
    rows = equal.shape[-1]
    if equal.is_cuda and inverse_cholesky(equal) is not None:  # the support is everything, in any basis
        support = torch.ones_like(equal[:, 0], dtype=torch.bool)
        support_basis = torch.eye(equal.shape[-1], dtype=equal.dtype, device=equal.device).expand_as(equal)
    else:
        values, support_basis = descending_eigh(equal)
        support = values > TOLERANCE**2 * values[:, :1]
        support_basis = support_basis * support[:, None, :]
        rows = max(1, int(support.sum(-1).max()))  # one of padding where nothing changes
    inside = support_basis.mT @ basis.R
    square = inside @ blocks @ inside.mT
    # A negative diagonal where the support ends keeps its padding apart from small singular values, and last.
    padding = torch.where(support, 0.0, -square.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True))
    _, rotation = descending_eigh(square + torch.diag_embed(padding))
    transform = (support_basis @ rotation)[:, :, :rows] * support[:, None, :rows]
    left = transform.mT @ basis.R
    sign = _direction(left)
    return Bases((sign * left).float(), None, basis.T @ transform * sign.mT, None, support.sum(-1), None)


def core_bases(core: ModuleGroup, grams: Grams, singular: bool) -> Bases:
    """M_i = R_B,i R_A,iᵀ from B = Q_B R_B and Aᵀ = Q_A R_A."""
    both = list(zip((grams.B, grams.A), core.shape, strict=True))
    found = bases_at_once((grams.B, grams.A), core.shape, singular=singular)
    left, right = found or [orthonormal_basis(each, width, singular=singular) for each, width in both]
    if singular:
        left, right = _directed(left), _directed(right)
    sums = core.rank_sums.to(grams.A.device, non_blocking=True)
    rows, cols = (sums.clamp_max(size) for size in core.shape)
    return Bases(left.R, right.R.mT, left.T, right.T, rows, cols)


def _direction(rows: Tensor) -> Tensor:
    """1 or −1 for each basis vector u, (modules, k, 1), from uᵀX, rows (modules, k, K): one of the two that a solver may give.

    The first entry that is nearly the largest is made positive: copies of a column, and its negative, have entries of one
    magnitude, of which rounding would choose the largest. Rules that break ties by a sign would see which it was.
    """
    magnitude = rows.abs()
    first = (magnitude >= 0.7 * magnitude.amax(-1, keepdim=True)).int().argmax(-1, keepdim=True)
    return torch.where(rows.gather(-1, first) < 0, -1.0, 1.0).to(rows.dtype)


def _directed(basis: Basis) -> Basis:
    sign = _direction(basis.R)
    return Basis(basis.T * sign.mT, sign * basis.R, basis.rank)


def owners(slots: Sequence[slice]) -> Tensor:
    """The task that each of the K stacked rank-one terms is of, (K,) int64, on the CPU."""
    return _owners(tuple(slot.stop - slot.start for slot in slots))


@lru_cache(maxsize=64)
def _owners(widths: tuple[int, ...]) -> Tensor:
    # Of a list: a first operation that the CPU's threads share takes them milliseconds to wake up.
    return torch.tensor([task for task, width in enumerate(widths) for _ in range(width)], dtype=torch.int64)


def owner_matrix(slots: Sequence[slice]) -> Tensor:
    """(K, n) float64, 1 where a stacked rank-one term is of a task; on the CPU."""
    return (owners(slots)[:, None] == torch.arange(len(slots))).double()


_BUILDERS: dict[str, Build] = {
    "delta": delta_bases,
    "knots": knots_bases,
    "core": core_bases,
    "factors": delta_bases,  # until its method has made one task of all
}


def bases(space: str, core: ModuleGroup, grams: Grams, *, singular: bool) -> Bases:
    """What Gram matrices tell of modules of one `cored` group. singular: the bases must be singular vectors, where the
    space has a choice."""
    return _BUILDERS[space](core, grams, singular)


def coordinates(space: str, stack: Stack, grams: Grams, *, singular: bool) -> Coordinates:
    """The tasks of a stack in a space. singular: as `bases`."""
    found = bases(space, stack.group.cored(), grams, singular=singular)
    return found.on(stack.group, stack, found.entries(stack.group, stack.A.device))
