# SPDX-License-Identifier: Apache-2.0
"""From the merged coordinates of a batch, cut to their rank, to the factors of its modules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vllm_merge.adapters.factors import LoraFactors
from vllm_merge.adapters.stacking import Stack
from vllm_merge.algebra.truncation import Truncated
from vllm_merge.errors import MergeError
from vllm_merge.kernels import turns

if TYPE_CHECKING:
    from vllm_merge.engine.batches import Prepared
    from vllm_merge.engine.job import Job

CANCELLED = 1e-7  # of the largest weighted task; float32 rounding


@dataclass(frozen=True, slots=True)
class Lifted:
    """The factors of some modules' weight changes, B (modules, d_out, k) and A (modules, k, d_in), in the result's dtype.

    largest: the largest magnitude in a module's factors, (modules,).
    """

    modules: Sequence[str]
    B: Tensor
    A: Tensor
    largest: Tensor


def finite(values: Tensor, along: tuple[int, ...] | None = None) -> Tensor:
    """Whether all values along some dimensions are finite, or all there are."""
    if values.is_cuda:  # in one pass: a sum in float64 would write them in float64 first
        largest: Tensor = torch.linalg.vector_norm(values, torch.inf, dim=along)
        return largest < torch.inf
    return values.sum(along, dtype=torch.float64).isfinite()


def lifted(job: Job, prepared: Prepared, cut: Truncated, described: Truncated, tall: bool) -> Lifted:
    """The merged factors, made of some modules at a time. described: the same by singular vectors, for the report."""
    group, kept = prepared.batch.group, cut.long.shape[2]
    (d_out, d_in), count = group.shape, len(group.modules)
    stack = job.stack(prepared)
    b = torch.empty(count, d_out, kept, dtype=job.dtype, device=job.device)
    a = torch.empty(count, kept, d_in, dtype=job.dtype, device=job.device)
    inner = _inner(prepared, cut, tall)
    seen_inner = inner if described is cut else _inner(prepared, described, tall)
    for start in range(0, count, some := job.workspace.scratch_modules(prepared.batch.cost.lifted)):
        piece = slice(start, start + some)
        left, right = _sides(prepared, stack, inner, piece)
        if job.overview is not None:
            with job.timed("report"):
                seen = (left, right) if described is cut else _sides(prepared, stack, seen_inner, piece)
                job.overview.add(stack.of(piece), prepared.grams.of_some(piece), *seen)
        # Singular vectors are unique up to sign: the largest entry of each column of B is made positive.
        if cut.singular:
            sign = torch.where(left.gather(1, left.abs().argmax(1, keepdim=True)) < 0, -1.0, 1.0)
            torch.mul(left, sign, out=b[piece])
            torch.mul(right.mT, sign.mT, out=a[piece])
        else:
            b[piece].copy_(left)
            a[piece].copy_(right.mT)
        turns.between()
    largest = torch.maximum(*(torch.linalg.vector_norm(side, torch.inf, (1, 2)) for side in (b, a)))
    return Lifted(group.modules, b, a, largest)


def facts(cut: Truncated, noise: Tensor, several: Sequence[Lifted]) -> Tensor:
    """What is to be read of each module, (modules, 6) float64: rank, norm, share of the energy, whether nothing was cut, the
    norm that is noise, the largest magnitude in a factor. several: all that was made of the cut."""
    largest = torch.cat([one.largest for one in several])
    found = (cut.ranks, cut.norm, cut.energy, cut.exact, noise, largest)
    return torch.stack([fact.double() for fact in found], 1)


def read(job: Job, several: Sequence[Lifted], known: Sequence[Tensor]) -> dict[str, LoraFactors]:
    """The factors by module, and what the report says of them: the one time the device is waited for. known: their `facts`."""
    together = torch.cat(list(known))
    whole = [(one.A.unbind(), one.B.unbind()) for one in several]  # while the device still works
    facts = iter(together.tolist())
    found: dict[str, LoraFactors] = {}
    for one, (all_a, all_b) in zip(several, whole, strict=True):
        of_rank: dict[int, list[int]] = {}
        for index, module in enumerate(one.modules):
            ranks, norm, energy, exact, noise, largest = next(facts)
            if not largest < torch.inf:
                raise MergeError(f"module '{module}': the merged factors do not fit {job.dtype}; choose a wider dtype")
            rank = int(ranks)
            if rank == 0 or norm <= noise:
                job.report.dropped_modules.append(module)
                continue
            job.report.ranks[module] = rank
            job.report.norms[module] = norm
            job.report.energy_kept[module] = None if exact else energy
            of_rank.setdefault(rank, []).append(index)
        for rank, indices in of_rank.items():
            a, b = all_a, all_b
            # Copies where anything was cut off: nothing must keep its memory.
            if len(indices) < len(one.modules) or rank < one.B.shape[2]:
                where = torch.tensor(indices).to(one.B.device, non_blocking=True)
                a = one.A[:, :rank].index_select(0, where).unbind()
                b = one.B[:, :, :rank].index_select(0, where).unbind()
            factors = map(LoraFactors, a, b)
            found.update(zip([one.modules[index] for index in indices], factors, strict=True))
    return found


def _inner(prepared: Prepared, cut: Truncated, tall: bool) -> tuple[Tensor, Tensor]:
    """The factors of the merged coordinates, or what B and Aᵀ are multiplied with: (modules, rows, k), (modules, cols, k)."""
    space = prepared.coordinates
    left, right = (cut.long, cut.short) if tall else (cut.short, cut.long)
    if space.left_transform is not None:
        left = space.left_transform @ left.double()
    if space.right_transform is not None:
        right = space.right_transform @ right.double()
    return left, right


def _sides(prepared: Prepared, stack: Stack, inner: tuple[Tensor, Tensor], modules: slice) -> tuple[Tensor, Tensor]:
    """The factors of the weight change: (modules, d_out, k), (modules, d_in, k)."""
    space, of = prepared.coordinates, prepared.product or stack
    left, right = (side[modules] for side in inner)
    if space.left_transform is not None:
        left = of.B[modules].double() @ left
    if space.right_transform is not None:
        right = (right.mT @ of.A[modules].double()).mT  # rows of A lie as those of the result
    return left, right


def noise(prepared: Prepared) -> Tensor:
    """Norm under which a result is what rounding leaves of tasks that cancel, (modules,) float64."""
    scale = prepared.grams.norms * prepared.lam.abs()[:, None]
    if "weight" in prepared.parameters:
        scale = scale * prepared.parameters["weight"].abs()
    return scale.amax(1) * CANCELLED
