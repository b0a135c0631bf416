# SPDX-License-Identifier: Apache-2.0
"""Karcher mean: the point of the sphere with the least sum of squared angles to the tasks (Karcher, 1977), as in mergekit.

The mean is a combination of the unit tasks, m = Σ c_i ΔW_i / ‖ΔW_i‖, so each step moves n numbers per module; angles come from
the Gram matrix. mergekit averages whole models, W₀ + ΔW, whose angles are nearly 0.
"""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from vllm_merge.algebra.cores import Cores
from vllm_merge.algebra.spherical import Angles, length
from vllm_merge.algebra.tiles import Passes
from vllm_merge.methods.markers import PerAdapter
from vllm_merge.methods.registry import merge_method
from vllm_merge.methods.weights import check_weights

VANISHING = 1e-7  # a mean of unit tasks this short has no direction; the sine of an angle whose plane is rounding


def check(passes: Passes, **parameters: object) -> None:
    """Refuse weights that cannot be normalised."""
    check_weights(passes, "karcher")


def karcher_mean(cosines: Tensor, weights: Tensor, steps: int, tolerance: float) -> tuple[Tensor, Tensor]:
    """Coefficients c of the mean in unit tasks, (modules, n), and where there is one, (modules,) bool.

    weights: (modules, n), adding up to 1 over the tasks that are not zero. A step goes along T = Σ w_i θ_i t_i, t_i the
    direction from the mean to task i, until ‖T‖ < tolerance.
    """
    size = length(weights, cosines)
    exists = size > VANISHING
    mean = weights / torch.where(exists, size, 1.0)[:, None]
    moving = exists
    for _ in range(steps):
        dots = (cosines @ mean[..., None])[..., 0].clamp(-1, 1)
        theta = dots.acos()
        sine = theta.sin()
        reach = torch.where((theta < tolerance) | (sine < VANISHING), 0.0, weights * theta / sine.clamp_min(VANISHING))
        tangent = reach - (reach * dots).sum(1, keepdim=True) * mean
        step = length(tangent, cosines)
        moving = moving & (step >= tolerance)
        if not bool(moving.any()):
            break
        turned = step.cos()[:, None] * mean + (step.sin() / torch.where(moving, step, 1.0))[:, None] * tangent
        turned = turned / length(turned, cosines).clamp_min(VANISHING)[:, None]
        mean = torch.where(moving[:, None], turned, mean)
    return mean, exists


@merge_method(
    "karcher",
    spaces=("core",),
    reference="doi:10.1002/cpa.3160300502",
    statistics=check,
    whole_modules=True,
    iterative=True,
)
def karcher(
    cores: Cores,
    statistics: None,
    *,
    weight: Annotated[Tensor, PerAdapter(1.0), Ge(0)],
    max_iter: Annotated[int, Ge(1)] = 10,
    tol: Annotated[float, Gt(0)] = 1e-5,
) -> Tensor:
    """The mean direction on the sphere, with the weighted mean of the norms. Rank ≤ Σ r_i.

    max_iter, tol: at most so many steps, and none shorter, in radians. An adapter that lacks a module has no direction there;
    its norm counts as 0. Where directions cancel there is no mean direction: there it is the weighted mean.
    """
    angles, weights = Angles.of(cores.gram()), weight[:, :, 0, 0] / weight.sum(1)[:, :, 0]
    there = weights * (angles.norms > 0)
    total = there.sum(1, keepdim=True)
    mean, exists = karcher_mean(angles.cosines, there / torch.where(total > 0, total, 1.0), max_iter, tol)
    size = (weights * angles.norms).sum(1, keepdim=True)
    return cores.scaled(torch.where(exists[:, None], size * mean * angles.inverse, weights)).total()
