# SPDX-License-Identifier: Apache-2.0
"""The steps of `methods.do_orthogonalize`'s descent on a GPU: three products of matrices each, and a kernel for all between.

A matrix per program: it judges the step that was tried (taken back where the loss rose), and makes the matrix of the next.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_merge.kernels import turns

LARGEST = 128  # K


@triton.jit(do_not_specialize=["new", "batch", "n", "k"], do_not_specialize_on_alignment=["bounds"])  # type: ignore[untyped-decorator]
def _judge(  # type: ignore[no-untyped-def]
    grams, changes, product, turn, losses, sizes, shift, traces, gamma_at, sums, weights, owner, bounds, new, batch, n, k,
    POWER: tl.constexpr, N: tl.constexpr, TASKS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """grams and changes (2, batch, k, k) hold what was tried at `new`, and what was before beside it."""
    program = tl.program_id(0).to(tl.int64)
    here = program * k * k
    at_new = (new * batch + program) * k * k
    at_old = ((1 - new) * batch + program) * k * k
    columns = tl.arange(0, N)
    inside = columns < k
    depth = tl.arange(0, DEPTH)
    for task in range(n):  # the sums of squares of every column, over the rows of each task
        row = tl.load(bounds + 2 * task) + depth
        there = (row < tl.load(bounds + 2 * task + 1))[:, None] & inside[None, :]
        entries = tl.load(grams + at_new + row[:, None] * k + columns[None, :], mask=there, other=0.0)
        tl.store(sums + (program * n + task) * k + columns, tl.sum(entries * entries, 0), mask=inside)
    tl.debug_barrier()  # they are stored
    one = tl.arange(0, TASKS)
    start = tl.load(bounds + 2 * one, mask=one < n, other=0)
    width = tl.load(bounds + 2 * one + 1, mask=one < n, other=0) - start
    pair = (one[:, None] != one[None, :]) & (one < n)[:, None] & (one < n)[None, :]
    summed = (one * k)[:, None, None] + start[None, :, None] + depth[None, None, :]
    counted = pair[:, :, None] & (depth[None, None, :] < width[None, :, None])
    squares = tl.sum(tl.load(sums + program * n * k + summed, mask=counted, other=0.0), 2)  # ‖Â_i Â_jᵀ‖², i ≠ j
    # ‖δ‖² = tr (C − 1) G (C − 1)ᵀ
    diagonal = columns * (k + 1)
    moved = tl.load(traces + program)
    moved += tl.sum(tl.load(grams + at_new + diagonal, mask=inside, other=0.0), 0)
    moved -= 2.0 * tl.sum(tl.load(product + here + diagonal, mask=inside, other=0.0), 0)
    gamma = tl.load(gamma_at)
    tried = tl.sum(tl.sum(squares if POWER == 2 else tl.sqrt(squares), 1), 0) + gamma * moved
    loss = tl.load(losses + program)
    accepted = tried <= loss
    size = tl.load(sizes + program)
    size = tl.where(accepted, size, size / 2.0)
    # Where the step is taken back, so are the weights of the blocks, which still are those that were stored before.
    some = squares > 0.0
    weight = tl.where(some, 4.0 if POWER == 2 else 2.0 / tl.sqrt(tl.where(some, squares, 1.0)), 0.0)
    blocks = weights + program * n * n
    allowed = (one < tl.where(accepted, n, 0))[:, None] & (one < n)[None, :]
    tl.store(blocks + one[:, None] * n + one[None, :], weight, mask=allowed)
    tl.debug_barrier()
    at = tl.where(accepted, at_new, at_old)
    back_to = tl.where(accepted, 0, k)  # rows that are taken back: none or all
    mine = tl.load(owner + columns, mask=inside, other=0)
    for task in range(n):
        row = tl.load(bounds + 2 * task) + depth
        there = (row < tl.load(bounds + 2 * task + 1))[:, None] & inside[None, :]
        place = row[:, None] * k + columns[None, :]
        entries = tl.load(grams + at + place, mask=there, other=0.0)
        pull = size * tl.load(blocks + task * n + mine, mask=inside, other=0.0)
        stay = tl.where(row[:, None] == columns[None, :], 1.0 - 2.0 * gamma * size, 0.0)
        tl.store(turn + here + place, stay - pull[None, :] * entries, mask=there)
        back = there & (row < back_to)[:, None]
        tl.store(grams + at_new + place, entries, mask=back)
        tl.store(changes + at_new + place, tl.load(changes + at_old + place, mask=back, other=0.0), mask=back)
    tl.store(losses + program, tl.where(accepted, tried, loss))
    tl.store(sizes + program, size)
    tl.store(shift + program, 2.0 * gamma * size)


def descended(gram: Tensor, slots: Sequence[slice], size: Tensor, steps: int, *, power: int, gamma: float) -> Tensor:
    """C (batch, K, K) after these steps, from A Aᵀ (batch, K, K), K ≤ 128, and the first steps' size (batch,); float64."""
    batch, k = gram.shape[:2]
    n, widest = len(slots), max(slot.stop - slot.start for slot in slots)
    owners = [task for task, slot in enumerate(slots) for _ in range(slot.start, slot.stop)]
    tables = torch.tensor([*owners, *(end for slot in slots for end in (slot.start, slot.stop))], dtype=torch.int32)
    owner, bounds = torch.split(tables.to(gram.device, non_blocking=True), [k, 2 * n])
    changes, grams = gram.new_zeros(2, *gram.shape), torch.stack([gram, gram])
    changes.diagonal(dim1=-2, dim2=-1).fill_(1)
    turn, product, sums, weights = (gram.new_empty(batch, *shape) for shape in ((k, k), (k, k), (n, k), (n, n)))
    product.copy_(gram)
    size, shift, loss = size.clone(), torch.empty_like(size), torch.full_like(size, torch.inf)
    trace, gamma_at = gram.diagonal(dim1=-2, dim2=-1).sum(-1), torch.full_like(size[:1], gamma)
    # Few different ones, each of which is compiled: as for n adapters of one rank that fill K.
    tasks = max(8, int(triton.next_power_of_2(n)))
    padded, depth = LARGEST, max(2, LARGEST // tasks, int(triton.next_power_of_2(widest)))
    warps = max(4, min(16, max(padded, tasks**2) * depth // 512))  # 16 numbers of a task's rows a thread, and copies

    def judge(new: int) -> None:
        _judge[(batch,)](
            grams, changes, product, turn, loss, size, shift, trace, gamma_at, sums, weights, owner, bounds, new, batch, n, k,
            POWER=power, N=padded, TASKS=tasks, DEPTH=depth, num_warps=warps,
        )  # fmt: skip

    judge(0)  # what is there at the start is better than a loss of infinity
    # Views that are made once: a step is too short for a GPU to wait while Python makes them.
    change, made = changes.unbind(), grams.unbind()
    turned, diagonal = [one.mT for one in change], [one.diagonal(dim1=-2, dim2=-1) for one in change]
    each_shift = shift[:, None]
    for step in range(steps):
        new = (step + 1) % 2
        torch.bmm(turn, change[1 - new], out=change[new])
        diagonal[new].add_(each_shift)
        torch.bmm(change[new], gram, out=product)
        torch.bmm(product, turned[new], out=made[new])
        judge(new)
        turns.between()
    return change[steps % 2]
