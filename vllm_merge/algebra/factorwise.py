# SPDX-License-Identifier: Apache-2.0
"""Space `factors`: the A and B of all tasks by themselves, as rules that merge the two factors apart need them.

Such a rule is not a rule of ΔW: (Σ w_i B_i)(Σ w_j A_j) has cross terms B_i A_j, and the same ΔW_i written with other
factors, (B_i C⁻¹)(C A_i), gives another result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from vllm_merge.adapters.factors import Adapter
from vllm_merge.adapters.stacking import ModuleGroup, Stack
from vllm_merge.errors import UserInputError

NOT_EXACT = (
    "space 'factors' merges A and B apart, which is not a merge of the weight changes: terms B_i A_j of different adapters "
    "are in the result, and it depends on how each adapter's change is split into A and B"
)
"""What every report of such a merge says."""


@dataclass(frozen=True, slots=True)
class FactorTasks:
    """What a method of space `factors` is given: a batch of modules.

    A: (modules, n, r, d_in), B: (modules, n, r, d_out), transposed, as trained, float32; r is the largest rank, rows
    beyond a task's own are zero. scaling: (modules, n, 1, 1), alpha / r; first_scaling: (modules, 1, 1), the first
    adapter's. ranks: (modules, n) int64, 0 where an adapter lacks the module. names: the adapters'. modules: positions
    among all modules of the merge. parameters: per-adapter ones, each (modules, n, 1, 1) float64.
    """

    A: Tensor
    B: Tensor
    scaling: Tensor
    first_scaling: Tensor
    ranks: Tensor
    group: ModuleGroup
    names: tuple[str, ...]
    modules: slice
    parameters: Mapping[str, Tensor]

    @classmethod
    def of(cls, stack: Stack, adapters: Sequence[Adapter], start: int, parameters: Mapping[str, Tensor]) -> FactorTasks:
        """From stacked factors. start: the position of the batch's first module."""
        group, device = stack.group, stack.A.device
        table = [[scaling_of(adapter, module) for adapter in adapters] for module in group.modules]
        first = [
            adapters[0].factors.get(module) or next(iter(adapters[0].factors.values())) for module in group.modules
        ]
        scaling = torch.tensor(table, device=device)[:, :, None, None]
        width = max(slot.stop - slot.start for slot in group.slots)
        a, b = (_by_task(side, group, width) for side in (stack.A, stack.B.mT))
        return cls(
            a,
            b / torch.where(scaling == 0, 1.0, scaling),
            scaling,
            torch.tensor([factors.scaling for factors in first], device=device)[:, None, None],
            torch.tensor(group.ranks, device=device),
            group,
            tuple(adapter.name for adapter in adapters),
            slice(start, start + len(group.modules)),
            parameters,
        )

    def check_equal_ranks(self, method: str) -> None:
        """Raise UserInputError where the adapters that have a module differ in rank, so that factors do not add up."""
        for module, ranks in zip(self.group.modules, self.group.ranks, strict=True):
            present = {rank: name for rank, name in zip(reversed(ranks), reversed(self.names), strict=True) if rank}
            if len(present) > 1:
                found = ", ".join(f"'{name}' has {rank}" for rank, name in sorted(present.items()))
                raise UserInputError(
                    f"merge method '{method}' adds factors entry by entry, so that all adapters need one rank; at module "
                    f"'{module}' adapter {found}. Use the method without 'factor_' in another space, or bring the "
                    f"adapters to one rank first, each by a recipe of its own (merge_method: task_arithmetic, "
                    f"rank: {min(present)}) that this recipe then lists"
                )

    def product(self, a: Tensor, b: Tensor) -> Stack:
        """Merged factors a (modules, r, d_in) and b (modules, r, d_out) as the one task that is left."""
        rank = a.shape[1]
        group = ModuleGroup(self.group.shape, self.group.modules, ((rank,),) * len(a), (slice(0, rank),))
        return Stack(group, a, b.mT)


def scaling_of(adapter: Adapter, module: str) -> float:
    """alpha / r of an adapter at a module, 1 where it lacks the module."""
    return adapter.factors[module].scaling if module in adapter.factors else 1.0


def _by_task(side: Tensor, group: ModuleGroup, width: int) -> Tensor:
    """(modules, K, d) as (modules, n, width, d)."""
    rows = [side[:, slot] for slot in group.slots]
    return torch.stack([pad(own, (0, 0, 0, width - own.shape[1])) for own in rows], dim=1)
