# SPDX-License-Identifier: Apache-2.0
"""What the rules of space `factors` share: A and B of all tasks with their weights, pruned, and put together again.

A rule is run on A and on B by itself, each task's entries being values_i with a weight u_i. By `compat`:

none    A_i with w_i, and s_i B_i with |w_i|; the rule is a mean, so that n copies of an adapter give that adapter.
peft    A_i with ±√|w_i s_i|, and B_i with √|w_i s_i|; the rule is a sum (huggingface/peft, add_weighted_adapter).
lorax   A_i with w_i, and B_i with w_i; a sum, times the first adapter's alpha / r (predibase/lorax, merge_adapters).

s_i = alpha_i / r_i. The mean of A is of the tasks that have the module, that of B of all, a task that lacks it counting as
zero: a module that one of n tasks has then comes out at 1 / n, as in `linear`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from vllm_merge.algebra.factorwise import FactorTasks
from vllm_merge.algebra.masks import keep_mask, mask_identity, mask_keys
from vllm_merge.algebra.selection import kth_largest
from vllm_merge.algebra.tiles import Passes

Compat = Literal["none", "peft", "lorax"]


@dataclass(frozen=True, slots=True)
class Side:
    """A, or B transposed, of all tasks. values: (modules, n, r, d); weight: u_i, (modules, n, 1, 1), 0 where a task lacks
    the module; entries: (modules, n) int64, without padding; index: 0 for A, 1 for B; divisor: of a mean, (modules, 1, 1),
    None where the rule is a sum."""

    values: Tensor
    weight: Tensor
    entries: Tensor
    index: int
    divisor: Tensor | None

    def magnitude_pruned(self, density: Tensor) -> Side:
        """The ⌊density · entries⌋ largest entries of each task (and what equals the last), at least one; zero elsewhere."""
        counts = (self.entries * density[:, :, 0, 0]).long().clamp_min(1)
        everything = slice(0, len(counts))
        threshold = kth_largest(lambda: [(self.values, everything)], counts)[:, :, None, None]
        return replace(self, values=torch.where(self.values.abs() >= threshold, self.values, 0.0))

    def randomly_pruned(self, density: Tensor, keys: Tensor, rescale: bool) -> Side:
        """Each entry kept with probability density, divided by it where `rescale`. keys: (modules, n, 2)."""
        rows, cols = (slice(0, size) for size in self.values.shape[2:])
        kept = self.values * keep_mask(keys[..., self.index], density, rows, cols)
        return replace(self, values=kept.div_(density) if rescale else kept)

    def total(self) -> Tensor:
        """Σ u_i x_i, or the mean; (modules, r, d)."""
        total = (self.weight * self.values).sum(1)
        return total if self.divisor is None else total / positive(self.divisor)


def positive(divisor: Tensor) -> Tensor:
    """The divisor, with 1 where it is 0."""
    return torch.where(divisor > 0, divisor, 1.0)


def merge_sides(
    tasks: FactorTasks, method: str, compat: Compat, weight: Tensor, rule: Callable[[Side], Tensor]
) -> tuple[Tensor, Tensor]:
    """The rule on A and on B. weight: w_i, (modules, n, 1, 1). Raises UserInputError where ranks differ."""
    tasks.check_equal_ranks(method)
    weight = weight.float()
    of_all = weight.abs().sum(1)
    weight = weight * (tasks.ranks > 0)[:, :, None, None]
    scaled = weight * tasks.scaling
    roots = scaled.abs().sqrt()
    of_a, of_b = {
        "none": (weight, weight.abs()),
        "peft": (torch.where(scaled < 0, -roots, roots), roots),
        "lorax": (weight, weight),
    }[compat]
    entries = [tasks.ranks * side.shape[-1] for side in (tasks.A, tasks.B)]
    b = tasks.B * tasks.scaling if compat == "none" else tasks.B
    merged_a = rule(Side(tasks.A, of_a, entries[0], 0, weight.abs().sum(1) if compat == "none" else None))
    merged_b = rule(Side(b, of_b, entries[1], 1, of_all if compat == "none" else None))
    return merged_a, merged_b * tasks.first_scaling if compat == "lorax" else merged_b


def factor_mask_keys(passes: Passes, **parameters: object) -> Tensor:
    """Keys of random masks, (all modules, n, 2) int64: of A and of B."""
    identities = [mask_identity(adapter) for adapter in passes.adapters]
    keys = [
        mask_keys(passes.seed, identities, [f"{module}\0{side}" for module in passes.modules]) for side in ("A", "B")
    ]
    return torch.stack(keys, dim=-1).to(passes.lambdas.device)
