# SPDX-License-Identifier: Apache-2.0
"""Multi-SLERP: barycentric interpolation on the sphere, as in mergekit.

mergekit projects the unit tasks onto the tangent space at their weighted mean m / ‖m‖, averages there with the same weights,
and projects back. That average is m − ⟨m, m⟩ / ‖m‖² m = 0: the result is the mean's direction itself, and so it is written here.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from vllm_merge.algebra.cores import Cores
from vllm_merge.algebra.spherical import Angles, length
from vllm_merge.algebra.tiles import Passes
from vllm_merge.methods.markers import PerAdapter
from vllm_merge.methods.registry import merge_method
from vllm_merge.methods.weights import check_weights

VANISHING = 1e-7  # of Σ |w_i|: a mean this short has no direction


def check(passes: Passes, *, normalize: bool) -> None:
    """Refuse weights that cannot be normalised."""
    if normalize:
        check_weights(passes, "multislerp")


@merge_method(
    "multislerp",
    spaces=("core",),
    reference="https://goddard.blog/posts/multislerp-wow-what-a-cool-idea",
    statistics=check,
    whole_modules=True,
)
def multislerp(
    cores: Cores, statistics: None, *, weight: Annotated[Tensor, PerAdapter(1.0)], normalize: bool = True
) -> Tensor:
    """The weighted mean of the directions, with the weighted mean of the norms. Rank ≤ Σ r_i.

    m = Σ w_i ΔW_i / ‖ΔW_i‖, ΔW = λ (Σ w_i ‖ΔW_i‖) m / ‖m‖, norms of each module. normalize: w_i / Σ w_i in place of w_i.
    Where directions cancel there is no m: there it is the weighted sum.
    """
    angles, weights = Angles.of(cores.gram()), weight[:, :, 0, 0]
    if normalize:
        weights = weights / weights.sum(1, keepdim=True)
    size = length(weights, angles.cosines)
    cancels = size <= VANISHING * weights.abs().sum(1)
    stretch = (weights * angles.norms).sum(1) / torch.where(cancels, 1.0, size)
    return cores.scaled(torch.where(cancels[:, None], weights, weights * angles.inverse * stretch[:, None])).total()
