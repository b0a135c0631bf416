# SPDX-License-Identifier: Apache-2.0
"""OPCM: one task after the other, each projected away from what is merged (Tang et al., NeurIPS 2025, arXiv:2501.09522).

With X_t = λ_t · merged_t the recursion of the paper is a sum, and its norms are needed only at the end:

    X_1 = ΔW_1,  X_t = X_{t−1} + P_t(ΔW_t),  ΔW = X_T · N / ‖X_T‖,  λ_T = ‖X_T‖ / N,  N = mean_t ‖ΔW_t‖,

where ‖·‖ is over the whole model. P_t works on the numerical support of X_{t−1} alone: the original clears a diagonal in
an arbitrary basis of its null space as well, which on low-rank changes makes the result full-rank and not reproducible.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Any

import torch
from annotated_types import Ge, Lt
from torch import Tensor

from vllm_merge.algebra.cores import Cores
from vllm_merge.algebra.spectral import Triples, triples_of
from vllm_merge.algebra.symmetric import looked_at_once
from vllm_merge.algebra.tiles import Passes
from vllm_merge.errors import UserInputError
from vllm_merge.kernels import turns
from vllm_merge.methods.markers import PerAdapter
from vllm_merge.methods.registry import merge_method

_ROUNDING = 1e-10  # of what a term has, relative to the largest


class OpcmSequence:
    """The merged tasks of the whole model, and the state from which one more task can be added."""

    def __init__(self, passes: Passes, *, alpha: float, shuffle: bool, resume: bool) -> None:
        names = [adapter.name for adapter in passes.adapters]
        before = _continuation(passes.adapters[0].name, passes.adapters[0].metadata) if resume else None
        order = _order(len(names), passes.seed if shuffle else None, resume)
        # An earlier result is its parameter λ (by module) · merged.
        scales = [before["lambda"] / (before["scale"].get(m) or 1.0) if before else 1.0 for m in passes.modules]
        scale = passes.lambdas.new_tensor(scales)
        self._sums: dict[int, Tensor] = {}
        squares = torch.zeros(len(names), dtype=torch.float64, device=scale.device)
        total = squares.new_zeros(())
        for cores in passes.cores():
            tasks = cores.scaled(cores.parameters["weight"])
            x = looked_at_once(partial(_summed, tasks, _reach(cores), order, scale[cores.modules], alpha))
            squares += tasks.norms().square().sum(0)
            total += x.square().sum()
            self._sums[cores.modules.start] = x
            passes.hold(x.nbytes)
        found = squares.sqrt().tolist()
        new = order[1:] if before else order
        norms = [*(before["norms"] if before else []), *(found[index] for index in new)]
        norm, mean = float(total.sqrt()), sum(norms) / len(norms)
        self.strength = mean / norm if norm > 0 else 0.0
        """N / ‖X_T‖."""
        self.continuation: dict[str, Any] = {
            "method": "opcm",
            "order": [*(before["order"] if before else []), *(names[index] for index in new)],
            "norms": norms,
            "lambda": norm / mean if mean > 0 else 0.0,
            "scale": dict(zip(passes.modules, passes.lambdas.tolist(), strict=True)),
        }

    def sums(self, modules: slice) -> Tensor:
        """X_T of modules of one shape, by their positions."""
        found = []
        for start, x in self._sums.items():
            first, last = max(start, modules.start), min(start + len(x), modules.stop)
            if first < last:
                found.append(x[first - start : last - start])
        return found[0] if len(found) == 1 else torch.cat(found)


def _summed(
    tasks: Cores, reach: Sequence[tuple[int, int]], order: Sequence[int], scale: Tensor, alpha: float
) -> Tensor:
    """X_T, (modules, rows, cols). scale: (modules,), of the first task."""
    rows, cols = reach[order[0]]
    x = tasks.dense(order[0]) * scale[:, None, None]
    for index in order[1:]:
        x += projected(tasks.dense(index), triples_of(x[:, :rows, :cols]), alpha)
        rows, cols = max(rows, reach[index][0]), max(cols, reach[index][1])
        turns.between()
    return x


def _reach(cores: Cores) -> list[tuple[int, int]]:
    """Of each task, how many leading rows and columns have all of it: what is beyond them is rounding.

    Bases that were made term by term have task i within the first r_1 + … + r_i, and what is merged is decomposed there.
    """
    ends = []
    for side in (cores.left, cores.right.mT):
        magnitude = side.abs()
        there = (magnitude > _ROUNDING * magnitude.amax(1, keepdim=True)).any(0)
        ends.append((there * torch.arange(1, len(there) + 1, device=side.device)[:, None]).amax(0))
    found = torch.stack(ends).tolist()
    return [(max([1, *rows]), max([1, *cols])) for rows, cols in ([end[slot] for end in found] for slot in cores.slots)]


def projected(task: Tensor, merged: Triples, alpha: float) -> Tensor:
    """P_t(ΔW_t) = ΔW_t − U R Vᵀ, what of the task is new to merged = U S Vᵀ, in the place of the task.

    R has the entries of UᵀΔW_tV of the leading directions, those with the share alpha of ΣS, and on the diagonal. U and V
    may lack the last rows, where they are zero.
    """
    corner = task[:, : merged.U.shape[1], : merged.V.shape[1]]
    within = merged.U.mT @ corner @ merged.V
    share = merged.S.cumsum(-1) / merged.S.sum(-1, keepdim=True).clamp_min(torch.finfo(merged.S.dtype).tiny)
    leading = torch.arange(within.shape[-1], device=within.device) < (share <= alpha).sum(-1, keepdim=True)
    remove = leading[:, :, None] & leading[:, None, :]
    remove = remove | torch.eye(within.shape[-1], dtype=torch.bool, device=within.device)
    corner -= merged.U @ (within * remove) @ merged.V.mT
    return task


def _order(count: int, seed: int | None, first: bool) -> list[int]:
    """The order of the tasks; first: task 0 stays the first."""
    if seed is None:
        return list(range(count))
    generator = torch.Generator().manual_seed(seed)
    fixed = int(first)
    shuffled = torch.randperm(count - fixed, generator=generator) + fixed
    return [*range(fixed), *shuffled.tolist()]


def _continuation(name: str, metadata: Mapping[str, object]) -> dict[str, Any]:
    state = metadata.get("continuation")
    if not isinstance(state, dict) or state.get("method") != "opcm":
        raise UserInputError(
            f"merge method 'opcm' with resume: the first adapter, '{name}', is not a result of opcm that carries its "
            "state (MergedAdapter.as_adapter() does); put one first, or set resume: false"
        )
    return state


@merge_method(
    "opcm", spaces=("core",), reference="arXiv:2501.09522", statistics=OpcmSequence, whole_modules=True, ordered=True
)
def opcm(
    cores: Cores,
    statistics: OpcmSequence,
    *,
    weight: Annotated[Tensor, PerAdapter(1.0)],
    alpha: Annotated[float, Ge(0), Lt(1)] = 0.5,
    shuffle: bool = False,
    resume: bool = False,
) -> Tensor:
    """Add the tasks one by one, each without what it shares with those before. Order matters. Rank ≤ Σ r_i.

    alpha: share of the singular values of what is merged whose directions are closed to the next task. shuffle: an
    order drawn with the recipe's seed in place of that of the recipe; the report has it. resume: the first adapter is an
    earlier result of opcm, which goes on with the others as if it had not stopped; exact where its rank was lossless.
    """
    return statistics.strength * statistics.sums(cores.modules)
