# SPDX-License-Identifier: Apache-2.0
"""Model Stock: how far to go towards the mean, from the angle between the tasks (Jang et al., ECCV 2024, arXiv:2403.19522).

The paper has one angle for all pairs; with more than two tasks it is the mean of the pairwise cosines, as in mergekit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor

from vllm_merge.adapters.factors import Adapter
from vllm_merge.adapters.stacking import Stack
from vllm_merge.algebra.cores import Cores
from vllm_merge.algebra.spherical import Angles
from vllm_merge.methods.linewise import scaled_by_line
from vllm_merge.methods.markers import PerAdapter
from vllm_merge.methods.preconditions import Context
from vllm_merge.methods.registry import merge_method
from vllm_merge.methods.resolve import ResolvedParameters

VANISHING = 1e-9  # of n: 1 + (n − 1) cos θ where the directions add up to nothing


def share_of_mean(grams: Tensor, reverse: bool) -> Tensor:
    """t = n cos θ / (1 + (n − 1) cos θ), (…); 1 for one task, 0 where the tasks' directions add up to nothing.

    reverse: let t be negative.
    """
    n = grams.shape[-1]
    if n == 1:
        return torch.ones_like(grams[..., 0, 0])
    cosines = Angles.of(grams).cosines
    mean = (cosines.sum((-1, -2)) - cosines.diagonal(dim1=-2, dim2=-1).sum(-1)) / (n * (n - 1))
    below = 1 + (n - 1) * mean
    vanishes = below <= VANISHING * n
    share = torch.where(vanishes, 0.0, n * mean / torch.where(vanishes, 1.0, below))
    return share if reverse else share.clamp_min(0)


def by_row(
    adapters: Sequence[Adapter], context: Context, space: str, parameters: ResolvedParameters
) -> Sequence[Adapter]:
    """The adapters with their rows scaled, where the merge is row by row."""
    if parameters.per_recipe["by"] == "module":
        return adapters

    def of_rows(grams: Tensor, stack: Stack) -> Tensor:
        n = len(adapters)
        sign = parameters.tensors(stack.group.modules, grams.device)["weight"].sign()[:, None]
        grams = grams * sign[..., :, None] * sign[..., None, :]
        return (share_of_mean(grams, parameters.per_recipe["reverse"]) / n)[..., None].expand(*grams.shape[:-2], n)

    return scaled_by_line(adapters, context, "row", of_rows)


@merge_method("model_stock", spaces=("core",), reference="arXiv:2403.19522", prepare=by_row, whole_modules=True)
def model_stock(
    cores: Cores,
    statistics: None,
    *,
    weight: Annotated[Tensor, PerAdapter(1.0)],
    by: Literal["module", "row"] = "module",
    reverse: bool = False,
) -> Tensor:
    """A share of the mean that grows with how well the tasks agree, ΔW = λ t / n Σ ΔW_i. Rank ≤ Σ r_i.

    t = n cos θ / (1 + (n − 1) cos θ), cos θ the mean cosine of all pairs, of each module or (by: row) of each row of ΔW.
    Adapters at right angles give nearly nothing. reverse: where cos θ < 0 let t be negative, which turns the mean around,
    without bound near cos θ = −1 / (n − 1), as mergekit does; otherwise t is 0 there. weight: multiplies a task's change
    before.
    """
    tasks = cores.scaled(weight)
    if by == "row":
        return tasks.total()
    n = len(tasks.slots)
    return tasks.total() * (share_of_mean(tasks.gram(), reverse) / n)[:, None, None]
