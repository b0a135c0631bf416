# SPDX-License-Identifier: Apache-2.0
"""The data-free orthogonalisation of DO-Merging (Zheng et al., arXiv:2505.15875), alone as a precondition.

Per module, for the factors A_i as trained (and B_iᵀ, with the scaling, likewise), the change δ_i that minimises
    L = Σ_{i≠j} ‖Â_i Â_jᵀ‖ᵖ + γ Σ_i ‖δ_i‖²,   Â_i = A_i + δ_i.
L sees only Gram matrices, and its gradient stays within the span of the A_i: plain descent is exact in K × K, with
 = C A. Adam works entry by entry and needs the factors. Power, γ, steps and optimiser are not published; the defaults
are those of the one known implementation (msjo91/OCap), which takes Adam.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from vllm_merge.adapters.factors import Adapter, LoraFactors
from vllm_merge.adapters.stacking import ModuleGroup, Stack, group_modules
from vllm_merge.algebra.coordinates import owner_matrix
from vllm_merge.algebra.symmetric import descending_eigh
from vllm_merge.methods.preconditions import Context, change_stacks, precondition, stacks, unstack

_BETAS, _EPSILON = (0.9, 0.999), 1e-8  # of Adam
_ARRAYS = 12  # float64 arrays of a stack's size alive at once
_SMALL_ARRAYS = 12  # of a Gram matrix's size, in the descent


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
) -> list[dict[str, LoraFactors]]:
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
    """A, then Bᵀ, (modules, K, d) float64, and how many of the K rank-one terms a module has, (modules,).

    A term with a zero in A or B is no part of ΔW, and turns nothing away.
    """
    alive = (stack.A != 0).any(2) & (stack.B != 0).any(1)
    for side in (stack.A, stack.B.mT):
        yield side.double() * alive[:, :, None], alive.sum(1)


def _descend(
    adapters: Sequence[Adapter], context: Context, steps: int, power: int, gamma: float
) -> list[dict[str, LoraFactors]]:
    """Plain descent of modules of all shapes at once: it sees their Gram matrices alone, and these are K × K."""
    result: list[dict[str, LoraFactors]] = [{} for _ in adapters]
    alike: dict[tuple[int, ...], list[ModuleGroup]] = {}
    for group in group_modules(adapters):
        alike.setdefault(tuple(slot.stop for slot in group.slots), []).append(group)
    for groups in alike.values():
        pairs = _Pairs.of(groups[0], context.device, power, gamma)
        at_once = context.workspace_bytes // (2 * 8 * _SMALL_ARRAYS * groups[0].stacked_rank ** 2)
        for pieces in _pools(groups, max(1, at_once // 2)):
            grams = [
                side @ side.mT
                for group in pieces
                for stack in stacks(group, adapters, context, _ARRAYS)
                for side, _ in _sides(stack)
            ]
            turns = iter(torch.split(pairs.descended(torch.cat(grams), steps), [len(gram) for gram in grams]))
            for group in pieces:
                for stack in stacks(group, adapters, context, _ARRAYS):
                    a, b = (next(turns) @ side for side, _ in _sides(stack))
                    unstack(stack.group, a, b.mT, result)
    return result


def _pools(groups: Sequence[ModuleGroup], most: int) -> Iterator[list[ModuleGroup]]:
    """The groups, in lists of at most `most` modules."""
    pool: list[ModuleGroup] = []
    for piece in (piece for group in groups for piece in group.batches(most)):
        if sum(len(group.modules) for group in [*pool, piece]) > most:
            yield pool
            pool = []
        pool.append(piece)
    yield pool


@dataclass(frozen=True, slots=True)
class _Pairs:
    """The loss over pairs of adapters. owner: (n, K) float64, 1 where a rank-one term is an adapter's."""

    owner: Tensor
    power: int
    gamma: float

    @classmethod
    def of(cls, group: ModuleGroup, device: torch.device, power: int, gamma: float) -> _Pairs:
        return cls(owner_matrix(group.slots).to(device).mT.contiguous(), power, gamma)

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

    def descended(self, gram: Tensor, steps: int) -> Tensor:
        """C (modules, K, K) with  = C A after `steps` of plain descent, from A Aᵀ (modules, K, K) float64."""
        one = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        c = one.expand_as(gram).clone()
        norms = self.norms(gram)
        pairs = (norms > 0).sum((-1, -2)).clamp_min(1)
        stretch = (2 * self.power * norms.pow(self.power - 1)).sum((-1, -2)) / pairs
        mean = norms.sum((-1, -2)) / pairs
        # For p = 2, 12 λ_max + 2γ bounds the curvature at the start; for p = 1 it is of the order of a mean block's.
        slope = torch.where(mean > 0, stretch / mean, 0.0)
        curvature = 3 * slope * descending_eigh(gram)[0][:, 0] + 2 * self.gamma
        size = torch.where(curvature > 0, 1 / curvature, 0.0)
        now, loss = gram, self.overlap(norms)
        for _ in range(steps):
            step = torch.baddbmm(c - one, self.pull(now, norms), c, beta=2 * self.gamma)
            tried = c - size[:, None, None] * step
            gram_tried = tried @ gram @ tried.mT
            norms_tried = self.norms(gram_tried)
            moved = tried - one
            loss_tried = self.overlap(norms_tried) + self.gamma * ((moved @ gram) * moved).sum((-1, -2))
            better = loss_tried <= loss
            there = better[:, None, None]
            c, now = torch.where(there, tried, c), torch.where(there, gram_tried, now)
            norms = torch.where(there, norms_tried, norms)
            loss, size = torch.where(better, loss_tried, loss), torch.where(better, size, size / 2)
        return c


def _adam(start: Tensor, pairs: _Pairs, terms: Tensor, steps: int, lr_scale: float) -> Tensor:
    """(modules, K, d) float64 after `steps` of Adam on δ from 0. terms: (modules,) int64, rank-one terms of each."""
    entries = (terms * start.shape[-1]).clamp_min(1)
    rate = lr_scale * (start.square().sum((-1, -2)) / entries).sqrt()[:, None, None]
    moved, mean, square = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    for step in range(1, steps + 1):
        gram = moved @ moved.mT
        slope = pairs.pull(gram, pairs.norms(gram)) @ moved + 2 * pairs.gamma * (moved - start)
        mean.lerp_(slope, 1 - _BETAS[0])
        square.mul_(_BETAS[1]).addcmul_(slope, slope, value=1 - _BETAS[1])
        unbiased = (square / (1 - _BETAS[1] ** step)).sqrt_().add_(_EPSILON)
        moved.sub_(rate / (1 - _BETAS[0] ** step) * mean / unbiased)
    return moved
