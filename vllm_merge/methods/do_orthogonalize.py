# SPDX-License-Identifier: Apache-2.0
"""The data-free orthogonalisation of DO-Merging (Zheng et al., arXiv:2505.15875), alone as a precondition.

Per module, for the factors A_i as trained (and B_iᵀ, with the scaling, likewise), the change δ_i that minimises
    L = Σ_{i≠j} ‖Â_i Â_jᵀ‖ᵖ + γ Σ_i ‖δ_i‖²,   Â_i = A_i + δ_i.
L sees only Gram matrices, and its gradient stays within the span of the A_i: plain descent is exact in K × K, with
 = C A. Adam works entry by entry and needs the factors. Power, γ, steps and optimiser are not published; the defaults
are those of the one known implementation (msjo91/OCap), which takes Adam.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from vllm_merge.adapters.factors import Adapter, LoraFactors
from vllm_merge.adapters.stacking import ModuleGroup, Stack, group_modules
from vllm_merge.algebra.bases import gram
from vllm_merge.algebra.coordinates import owner_matrix
from vllm_merge.algebra.symmetric import descending_eigh
from vllm_merge.kernels import turns
from vllm_merge.methods.preconditions import (
    Context,
    change_stacks,
    held_factors,
    precondition,
    stacks,
)

_BETAS, _EPSILON = (0.9, 0.999), 1e-8  # of Adam
_ARRAYS = 8  # float64 arrays of a stack's size alive at once
_GRAM_ARRAYS = 3  # in the descent
_HELD = 3  # times the float32 stacks, where they are held there
_SMALL_ARRAYS = 12  # of a Gram matrix's size there
_SQUARINGS = 30
LARGEST_IN_A_KERNEL = 128  # rows of a Gram matrix


@precondition("do_orthogonalize")
def do_orthogonalize(
    adapters: Sequence[Adapter],
    context: Context,
    *,
    optimizer: Literal["descent", "adam"] = "descent",
    steps: Annotated[int, Ge(1)] = 100,
    gamma: Annotated[float, Ge(0)] = 1.0,
    norm_power: Literal[1, 2] = 2,
    lr_scale: Annotated[float, Gt(0)] = 0.01,
) -> list[Mapping[str, LoraFactors]]:
    """Turn the adapters' factors away from one another, staying near them.

    optimizer: descent takes steps of 1 / (curvature at the start), halved where the loss would rise; adam takes steps of
    lr_scale · the root mean square of the module's factor entries. gamma: weight of Σ ‖δ‖². norm_power: p.
    """

    if optimizer == "descent":
        return _descend(adapters, context, steps, norm_power, gamma)

    def change(stack: Stack) -> tuple[Tensor, Tensor]:
        pairs = _Pairs.of(stack.group, context.device, norm_power, gamma)
        a, b = (_adam(side, pairs, terms, steps, lr_scale) for side, terms in _sides(stack))
        return a, b.mT

    return change_stacks(adapters, context, change, arrays=_ARRAYS)


def _sides(stack: Stack) -> Iterator[tuple[Tensor, Tensor]]:
    """A, then Bᵀ, (modules, K, d) float32, contiguous, and how many of the K rank-one terms a module has, (modules,).

    A term with a zero in A or B is no part of ΔW, and turns nothing away.
    """
    alive = (stack.A != 0).any(2) & (stack.B != 0).any(1)
    for side in (stack.A, stack.B.mT):
        yield (side * alive[:, :, None]).contiguous(), alive.sum(1)


def _descend(
    adapters: Sequence[Adapter], context: Context, steps: int, power: int, gamma: float
) -> list[Mapping[str, LoraFactors]]:
    """Plain descent of modules of all shapes at once: it sees their Gram matrices alone, and these are K × K."""
    changed: list[Stack] = []
    alike: dict[tuple[int, ...], list[ModuleGroup]] = {}
    for group in group_modules(adapters):
        alike.setdefault(tuple(slot.stop for slot in group.slots), []).append(group)
    for groups in alike.values():
        pairs = _Pairs.of(groups[0], context.device, power, gamma)
        at_once = context.workspace_bytes // (2 * 8 * _SMALL_ARRAYS * groups[0].stacked_rank ** 2)
        for pieces in _pools(groups, max(1, at_once // 2)):
            made = _stacks_of(pieces, adapters, context)
            found = [_alive_grams(stack) for stack in made()]
            grams = [gram for both, _ in found for gram in both]
            turns = iter(torch.split(pairs.descended(torch.cat(grams), steps), [len(gram) for gram in grams]))
            alive = iter([there for _, there in found])
            for stack in made():
                there = next(alive)[:, None, :]
                a, b = ((next(turns) * there).float() for _ in range(2))
                changed.append(Stack(stack.group, a @ stack.A, stack.B @ b.mT))
    return held_factors(changed, len(adapters))


def _stacks_of(
    groups: Sequence[ModuleGroup], adapters: Sequence[Adapter], context: Context
) -> Callable[[], Iterable[Stack]]:
    """Their stacks, as often as they are asked for: held where there is room for them, what is made of them and what is
    held meanwhile.
    """

    def made() -> Iterator[Stack]:
        for group in groups:
            yield from stacks(group, adapters, context, _GRAM_ARRAYS)

    entries = sum(len(group.modules) * group.stacked_rank * sum(group.shape) for group in groups)
    if _HELD * 4 * entries > context.workspace_bytes:
        return made
    held = list(made())
    return lambda: held


def _alive_grams(stack: Stack) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """A Aᵀ and BᵀB (modules, K, K), float64, 0 for terms that are no part of ΔW; and which are, (modules, K) float64."""
    grams = gram(stack.A.mT), gram(stack.B)
    a, b = (each.diagonal(dim1=-2, dim2=-1) != 0 for each in grams)
    there = (a & b).double()
    outer = there[:, :, None] * there[:, None, :]
    return (grams[0] * outer, grams[1] * outer), there


def _pools(groups: Sequence[ModuleGroup], most: int) -> Iterator[list[ModuleGroup]]:
    """The groups, in lists of at most `most` modules."""
    pool: list[ModuleGroup] = []
    for piece in (piece for group in groups for piece in group.batches(most)):
        if sum(len(group.modules) for group in [*pool, piece]) > most:
            yield pool
            pool = []
        pool.append(piece)
    yield pool


@dataclass(frozen=True)
class _Pairs:
    """The loss over pairs of adapters. owner: (n, K) float64, 1 where a rank-one term is an adapter's."""

    slots: tuple[slice, ...]
    owner: Tensor
    power: int
    gamma: float

    @classmethod
    def of(cls, group: ModuleGroup, device: torch.device, power: int, gamma: float) -> _Pairs:
        return cls(group.slots, owner_matrix(group.slots).mT.to(device, non_blocking=True), power, gamma)

    @cached_property
    def apart(self) -> Tensor:
        """(K, K) float64, 4 where two terms are of different adapters."""
        return 4 * (1 - self.owner.mT @ self.owner)

    def norms(self, gram: Tensor) -> Tensor:
        """‖Â_i Â_jᵀ‖_F of i ≠ j, (modules, n, n), from Â Âᵀ (modules, K, K)."""
        squared = self.owner @ gram.square() @ self.owner.mT
        squared.diagonal(dim1=-2, dim2=-1).zero_()
        return squared.sqrt_()

    def overlap(self, norms: Tensor) -> Tensor:
        """Σ_{i≠j} ‖Â_i Â_jᵀ‖ᵖ, (modules,), from the norms."""
        return norms.pow(self.power).sum((-1, -2))

    def pull(self, gram: Tensor, norms: Tensor) -> Tensor:
        """N with ∂/∂Â Σ_{i≠j} ‖Â_i Â_jᵀ‖ᵖ = N Â, (modules, K, K): the blocks times 2p‖·‖ᵖ⁻²; 0 where a block is 0."""
        weights = torch.where(norms > 0, 2 * self.power * norms.pow(self.power - 2), 0.0)
        return (self.owner.mT @ weights @ self.owner) * gram

    def pull_of(self, gram: Tensor) -> Tensor:
        """`pull` from the Gram matrix alone, which may be overwritten: for p = 2 every weight is 4."""
        return gram.mul_(self.apart) if self.power == 2 else self.pull(gram, self.norms(gram))

    def descended(self, gram: Tensor, steps: int) -> Tensor:
        """C (modules, K, K) with  = C A after `steps` of plain descent, from A Aᵀ (modules, K, K) float64.

        A step of size s is C ← (1 − 2γs) C − s N C + 2γs, with N as in `pull`.
        """
        norms = self.norms(gram)
        pairs = (norms > 0).sum((-1, -2)).clamp_min(1)
        stretch = (2 * self.power * norms.pow(self.power - 1)).sum((-1, -2)) / pairs
        mean = norms.sum((-1, -2)) / pairs
        # For p = 2, 12 λ_max + 2γ bounds the curvature at the start; for p = 1 it is of the order of a mean block's.
        slope = torch.where(mean > 0, stretch / mean, 0.0)
        curvature = 3 * slope * _largest_eigenvalue(gram) + 2 * self.gamma
        size = torch.where(curvature > 0, 1 / curvature, 0.0)
        if gram.is_cuda and gram.shape[-1] <= LARGEST_IN_A_KERNEL:
            from vllm_merge.kernels import descent

            return descent.descended(gram, self.slots, size, steps, power=self.power, gamma=self.gamma)
        return self.stepped(gram, size, steps)

    def stepped(self, gram: Tensor, size: Tensor, steps: int) -> Tensor:
        """The steps of `descended`, the first of these sizes (modules,)."""
        c = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device).expand_as(gram).clone()
        now, norms = gram, self.norms(gram)
        loss, start = self.overlap(norms), _trace(gram)
        for _ in range(steps):
            shift = (2 * self.gamma * size)[:, None]
            turn = self.pull(now, norms).mul_(-size[:, None, None])
            turn.diagonal(dim1=-2, dim2=-1).add_(1 - shift)
            tried = turn @ c
            tried.diagonal(dim1=-2, dim2=-1).add_(shift)
            product = tried @ gram
            gram_tried = product @ tried.mT
            norms_tried = self.norms(gram_tried)
            # ‖δ‖² = tr (C − 1) G (C − 1)ᵀ
            moved = start + _trace(gram_tried) - 2 * _trace(product)
            loss_tried = self.overlap(norms_tried) + self.gamma * moved
            better = loss_tried <= loss
            there = better[:, None, None]
            c, now = torch.where(there, tried, c), torch.where(there, gram_tried, now)
            norms = torch.where(there, norms_tried, norms)
            loss, size = torch.where(better, loss_tried, loss), torch.where(better, size, size / 2)
        return c


def _trace(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=-2, dim2=-1).sum(-1)


def _largest_eigenvalue(gram: Tensor) -> Tensor:
    """λ_max of positive semi-definite matrices, (modules,).

    On a GPU Σ λᴺ⁺¹ / Σ λᴺ with N = 2³⁰, by squaring: to within K / eN of it, and without all the other eigenvalues.
    """
    if not gram.is_cuda:
        return descending_eigh(gram)[0][:, 0]
    power = gram
    for step in range(_SQUARINGS + 1):
        if step % 5 == 0:  # before λᴺ leaves the range of float64
            power = power / _trace(power).clamp_min(torch.finfo(gram.dtype).tiny)[:, None, None]
        if step < _SQUARINGS:
            power = power @ power
    return (gram * power).sum((-1, -2))


def _adam(start: Tensor, pairs: _Pairs, terms: Tensor, steps: int, lr_scale: float) -> Tensor:
    """(modules, K, d) float64 after `steps` of Adam on δ from 0. start: float32, contiguous. terms: (modules,) int64, rank-one
    terms of each.
    """
    moved = start.double()
    entries = (terms * start.shape[-1]).clamp_min(1)
    rates = lr_scale * (moved.square().sum((-1, -2)) / entries).sqrt()
    mean, square, slope = torch.zeros_like(moved), torch.zeros_like(moved), torch.empty_like(moved)
    gram = moved.new_empty(*moved.shape[:2], moved.shape[1])
    numbers = _numbers(steps, pairs.gamma).to(moved.device, non_blocking=True)
    step_of = _step_by_torch
    if moved.is_cuda:
        from vllm_merge.kernels import adam

        step_of = adam.stepped
    for step in range(steps):
        torch.bmm(moved, moved.mT, out=gram)
        torch.bmm(pairs.pull_of(gram), moved, out=slope)
        step_of(moved, mean, square, slope, start, rates, numbers, step)
        turns.between()
    return moved


def _numbers(steps: int, gamma: float) -> Tensor:
    """What a step multiplies and divides by, (steps, 7) float64: 2γ, 1 − β₁, β₂, 1 − β₂, 1 − β₂ᵗ, ε, 1 − β₁ᵗ."""
    one, two = _BETAS
    return torch.tensor(
        [[2 * gamma, 1 - one, two, 1 - two, 1 - two**t, _EPSILON, 1 - one**t] for t in range(1, steps + 1)],
        dtype=torch.float64,
    )


def _step_by_torch(
    moved: Tensor, mean: Tensor, square: Tensor, slope: Tensor, start: Tensor, rates: Tensor, numbers: Tensor, step: int
) -> None:
    """What `kernels.adam.stepped` does. slope is overwritten."""
    pull, new, keep, add, unbias_square, epsilon, unbias_mean = numbers[step].tolist()
    slope.add_(moved - start, alpha=pull)
    mean.lerp_(slope, new)
    square.mul_(keep).addcmul_(slope, slope, value=add)
    torch.div(square, unbias_square, out=slope).sqrt_().add_(epsilon)
    moved.sub_((rates / unbias_mean)[:, None, None] * mean / slope)
