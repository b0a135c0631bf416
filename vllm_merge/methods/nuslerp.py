# SPDX-License-Identifier: Apache-2.0
"""NuSLERP: SLERP with weights, of whole modules or line by line, as in mergekit.

The angles are those of ΔW, from inner products of the factors. mergekit's `nuslerp_row_wise` takes columns when it is true
and rows when it is false; here `row` is a row of ΔW, one output feature, and `column` a column, one input feature.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from torch import Tensor

from vllm_merge.adapters.factors import Adapter
from vllm_merge.adapters.stacking import Stack
from vllm_merge.algebra.cores import Cores
from vllm_merge.algebra.spherical import Angles, slerp_coefficients
from vllm_merge.algebra.tiles import Passes
from vllm_merge.methods.linewise import By, scaled_by_line
from vllm_merge.methods.markers import PerAdapter
from vllm_merge.methods.pairs import check_pair
from vllm_merge.methods.preconditions import Context
from vllm_merge.methods.registry import merge_method
from vllm_merge.methods.resolve import ResolvedParameters
from vllm_merge.methods.weights import check_weights

STRAIGHT = 1e-6  # sin θ under which the arc is a line, or its plane is rounding


def check(passes: Passes, **parameters: object) -> None:
    """Refuse more than two adapters, and weights that do not say where between them."""
    check_pair("nuslerp")(passes)
    check_weights(passes, "nuslerp")


def coefficients(grams: Tensor, weights: Tensor) -> Tensor:
    """SLERP to t = w_2 / (w_1 + w_2), (…, 2). grams: (…, 2, 2), weights: (…, 2) that broadcasts."""
    cosine = Angles.of(grams).cosines[..., 0, 1]
    t = (weights[..., 1] / weights.sum(-1)).expand_as(cosine)
    return slerp_coefficients(cosine, t, cosine.square() > 1 - STRAIGHT**2)


def by_line(
    adapters: Sequence[Adapter], context: Context, space: str, parameters: ResolvedParameters
) -> Sequence[Adapter]:
    """The adapters with their lines scaled, where the merge is line by line."""
    by: By = parameters.per_recipe["by"]
    if by == "module" or len(adapters) != 2:
        return adapters

    def of_lines(grams: Tensor, stack: Stack) -> Tensor:
        weights = parameters.tensors(stack.group.modules, grams.device)["weight"]
        return coefficients(grams, weights[:, None])

    return scaled_by_line(adapters, context, by, of_lines)


@merge_method(
    "nuslerp",
    spaces=("core",),
    reference="doi:10.1145/325165.325242",
    statistics=check,
    prepare=by_line,
    whole_modules=True,
    most_adapters=2,
)
def nuslerp(cores: Cores, statistics: None, *, weight: Annotated[Tensor, PerAdapter(1.0)], by: By = "module") -> Tensor:
    """SLERP to t = w_2 / (w_1 + w_2), in whole modules, row by row or column by column. Rank ≤ Σ r_i.

    by: module takes one angle per module; row (an output feature) or column (an input feature) an angle for each.
    """
    if by != "module" or len(cores.slots) == 1:
        return cores.total()
    return cores.scaled(coefficients(cores.gram(), weight[:, :, 0, 0])).total()
