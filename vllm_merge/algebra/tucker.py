# SPDX-License-Identifier: Apache-2.0
"""Tucker-2: one pair of bases for several matrices, by higher-order orthogonal iteration (HOOI).

Finds orthonormal U, V of k columns that maximise Σ ‖Uᵀ M_i V‖²_F, started from the singular vectors of the matrices side
by side and on top of each other (De Lathauwer, De Moor, Vandewalle, SIAM J. Matrix Anal. Appl. 21, 2000). Each half of a step takes
the leading eigenvectors of a matrix that is near that of the step before: subspace iteration follows them, and modules for
which its residual is too large are left to the eigenvalue solver.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vllm_merge.algebra.bases import TOLERANCE
from vllm_merge.algebra.coordinates import owners
from vllm_merge.algebra.subspace import WAYS, Way, follow, settled
from vllm_merge.algebra.symmetric import descending_eigh
from vllm_merge.kernels import turns

MAX_ITERATIONS = 1000
LEAST_ITERATIONS = 3
AT_ONCE = 12  # iterations between two looks at which modules have stopped: a look waits for the GPU
ROOM = 4  # at most, for the vectors of these iterations: times that of M_i

_Follower = Callable[[Tensor, Tensor, Tensor, Tensor], None]
"""Of V, of X nearby, and of what `follow` writes."""


@dataclass(frozen=True, slots=True)
class _Tasks:
    """M_i = out_iᵀ @ into_i of some modules, Σ ‖M_i‖² = 1. out: (modules, K, rows), into: (modules, K, cols), contiguous.

    same_task: (K, K), as in `shared_bases`; width: the terms of each task, None where they differ.
    """

    out: Tensor
    into: Tensor
    same_task: Tensor
    width: int | None
    ranks: Tensor

    def some(self, which: Tensor) -> _Tasks:
        return replace(self, out=self.out[which], into=self.into[which], ranks=self.ranks[which])

    def outer(self, v: Tensor) -> Tensor:
        """Σ_i M_i V Vᵀ M_iᵀ, (modules, rows, rows)."""
        inner = torch.bmm(self.into, v)
        if self.width is None:
            return _within(self.out.mT, torch.bmm(inner, inner.mT), self.same_task)
        # W Wᵀ, W = [M_1 V … M_n V]: one product of full size in place of two.
        one, other = (part.view(-1, self.width, part.shape[2]) for part in (inner, self.out))
        products = torch.bmm(one.mT, other).view(len(v), -1, self.out.shape[2])
        return torch.bmm(products.mT, products)

    def follower(self, wide: int, way: Way | None) -> _Follower | None:
        """`outer` of the one and `follow` from the other, both of `wide` columns, in two launches; None where no kernel does."""
        if way is None or way.steps > 1 or self.width is None or not _on_a_gpu(self.out):
            return None
        from vllm_merge.kernels import orthonormal, powers

        terms, rows, cols = *self.out.shape[1:], self.into.shape[2]
        if not (powers.fits(terms // self.width, self.width, rows, cols, wide) and orthonormal.fits(rows, wide)):
            return None
        raised = powers.Powers(self.out, self.into, self.width, wide, way.products << way.squarings)
        return lambda far, near, found, told: orthonormal.advance(*raised(far, near), found, told)

    def turned(self) -> _Tasks:
        """M_iᵀ = into_iᵀ @ out_i."""
        return replace(self, out=self.into, into=self.out)


@dataclass(frozen=True, slots=True)
class _Path:
    """Some iterations of some modules. u: (iterations, modules, rows, k), v alike."""

    u: Tensor
    v: Tensor


def shared_bases(
    left: Tensor, right: Tensor, slots: Sequence[slice], ranks: Tensor, tolerance: float
) -> tuple[Tensor, Tensor]:
    """U (modules, rows, k) and V (modules, cols, k) for tasks M_i = left_i @ right_i, k = max ranks, strongest first.

    left: (modules, rows, K), right: (modules, K, cols), float64; slots: the terms, of K, of each task. A module stops when
    the error ‖M − U Uᵀ M V Vᵀ‖ / ‖M‖ of all its tasks changes by less than tolerance. Columns beyond its rank, ranks
    (modules,), or outside the support are zero.
    """
    owner = owners(slots)
    same_task = (owner[:, None] == owner).to(left.device, left.dtype, non_blocking=True)
    products = (left.mT @ left) * same_task
    squares = (products * (right @ right.mT)).sum((-1, -2))
    sizes = torch.where(squares > 0, squares, 1.0).sqrt()[:, None, None]
    widths = {slot.stop - slot.start for slot in slots}
    every = _Tasks(
        (left / sizes).mT.contiguous(), right.contiguous(), same_task, widths.pop() if len(widths) == 1 else None, ranks
    )
    width = int(ranks.max())
    # What u is made of. Its size is of no matter.
    made_of, _ = _exact(torch.bmm(torch.bmm(right.mT, products), right), ranks, width)
    v = made_of.clone()
    u = left.new_zeros(*left.shape[:2], min(width, left.shape[1]))
    open_ = squares.nonzero()[:, 0]
    tasks, u_now, v_now = every.some(open_), u[open_], v[open_]
    error = torch.full((len(open_),), torch.inf, dtype=torch.float64)
    narrow = min(u.shape[1], v.shape[1])
    ways: tuple[Way, ...] = WAYS if 2 * width <= narrow else ()
    at_once = min(AT_ONCE, ROOM * narrow // (2 * width))
    iteration = 0
    while len(open_):
        # The first iteration has no vectors nearby to begin with, and the next ones are far from theirs.
        usable = ways if iteration else ()
        count = min(iteration, at_once, MAX_ITERATIONS - iteration) if usable else 1
        path, kept, settled_at_once = _walk(tasks, u_now, v_now, count, usable)
        if iteration > LEAST_ITERATIONS and 2 * settled_at_once < len(open_):
            ways = ways[1:]
        errors = torch.cat([error[None], (1 - kept).clamp_min(0).sqrt()])
        stops = ~((errors[1:] - errors[:-1]).abs() >= tolerance)
        stops[: max(0, LEAST_ITERATIONS - 1 - iteration)] = False
        iteration += count
        stops[-1] |= iteration >= MAX_ITERATIONS
        at = stops.any(0).nonzero()[:, 0]
        if len(at):
            last = stops[:, at].to(torch.int8).argmax(0).to(u.device, non_blocking=True)
            here = at.to(u.device, non_blocking=True)
            made_of[open_[here]] = torch.cat([v_now[None], path.v])[last, here]
            u[open_[here]], v[open_[here]] = path.u[last, here], path.v[last, here]
        going = (~stops.any(0)).nonzero()[:, 0]
        u_now, v_now, error = path.u[-1], path.v[-1], errors[-1]
        if len(at):
            on = going.to(u.device, non_blocking=True)
            open_, tasks, u_now, v_now, error = open_[on], tasks.some(on), u_now[on], v_now[on], error[going]
    u = _resolved(every.outer(made_of), u, ranks)
    return u, _resolved(every.turned().outer(u), v, ranks)


def _walk(tasks: _Tasks, u: Tensor, v: Tensor, count: int, ways: tuple[Way, ...]) -> tuple[_Path, Tensor, int]:
    """`count` iterations from u, v, each module's by the first of the ways that is right for it, or the eigenvalue solver.

    Then Σ ‖Uᵀ M_i V‖², (iterations, modules), on the CPU, and for how many modules the first way is right.
    """
    way = ways[0] if ways else None
    path = _Path(u.new_empty(count, *u.shape), v.new_empty(count, *v.shape))
    measured = u.new_zeros(2, count, 4, len(u))
    _go(tasks, u.contiguous(), v.contiguous(), way, path, measured)
    told = measured.cpu()  # which waits for the GPU
    kept = told[1, :, 0]
    if not way:
        return path, kept, len(u)
    unsettled = (~settled(told.movedim(2, 0)).all(0).all(0)).nonzero()[:, 0]
    if len(unsettled):
        here = unsettled.to(u.device, non_blocking=True)
        again, kept[:, unsettled], _ = _walk(tasks.some(here), u[here], v[here], count, ways[1:])
        path.u[:, here], path.v[:, here] = again.u, again.v
    return path, kept, len(u) - len(unsettled)


def _go(tasks: _Tasks, u: Tensor, v: Tensor, way: Way | None, path: _Path, measured: Tensor) -> None:
    """The iterations of a path from u, v, all by one way; measured: (2, iterations, 4, modules), written, as by `follow`."""
    turned = tasks.turned()
    to_u, to_v = (side.follower(u.shape[2], way) for side in (tasks, turned))
    for index in range(len(path.u)):
        for side, to_side, near, far, found, told in (
            (tasks, to_u, u, v, path.u[index], measured[0, index]),
            (turned, to_v, v, path.u[index], path.v[index], measured[1, index]),
        ):
            if to_side:
                to_side(far, near, found, told)
            elif way:
                follow(side.outer(far), near, way, found, told)
            else:
                vectors, told[0] = _exact(side.outer(far), tasks.ranks, found.shape[-1])
                found.copy_(vectors)
        u, v = path.u[index], path.v[index]
        turns.between()


def _on_a_gpu(factors: Tensor) -> bool:
    return factors.is_cuda


def _within(side: Tensor, inner: Tensor, same_task: Tensor) -> Tensor:
    """Σ_i side_i inner_ii side_iᵀ, (modules, d, d)."""
    return torch.bmm(torch.bmm(side, inner * same_task), side.mT)


def _exact(matrices: Tensor, ranks: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The leading eigenvectors (modules, d, k), k = min(width, d), zero outside the support and beyond the rank, and the sum
    of their eigenvalues.
    """
    values, vectors = (part[..., :width] for part in descending_eigh(matrices))
    support = (values > TOLERANCE**2 * values[:, :1]) & (
        torch.arange(values.shape[1], device=ranks.device) < ranks[:, None]
    )
    return vectors * support[:, None, :], (values * support).sum(-1)


def _resolved(matrices: Tensor, basis: Tensor, ranks: Tensor) -> Tensor:
    """The leading eigenvectors, strongest first, of which `basis` (modules, d, k) is said to be a basis.

    It is the leading one if nothing outside it can be larger: the norm of the rest is below the least eigenvalue inside.
    The eigenvalue solver has what that does not show.
    """
    inside = basis.mT @ matrices @ basis
    values, rotation = descending_eigh(inside)
    support = (values > TOLERANCE**2 * values[:, :1]) & (
        basis.square().sum(1).count_nonzero(-1)[:, None] > torch.arange(values.shape[1], device=values.device)
    )
    least = torch.where(support, values, torch.inf).amin(-1)
    rest = matrices.square().sum((-1, -2)) - inside.square().sum((-1, -2))
    vectors = basis @ (rotation * support[:, None, :])
    open_ = (~(rest < least.square())).nonzero()[:, 0]
    if len(open_):
        vectors[open_] = _exact(matrices[open_], ranks[open_], vectors.shape[-1])[0]
    return vectors
