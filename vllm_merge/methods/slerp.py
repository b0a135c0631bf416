# SPDX-License-Identifier: Apache-2.0
"""SLERP: along the arc between two weight changes, as mergekit does between two models.

Angle and norms come from the inner products in space `core`, which are those of ΔW. mergekit turns whole models,
W₀ + ΔW, which turns and rescales W₀ as well: no LoRA can say that.
"""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge, Le
from torch import Tensor

from vllm_merge.algebra.cores import Cores
from vllm_merge.algebra.spherical import Angles, slerp_coefficients
from vllm_merge.methods.markers import PerAdapter
from vllm_merge.methods.pairs import check_pair
from vllm_merge.methods.registry import merge_method

STRAIGHT = 0.9995  # |cos θ| beyond which mergekit goes straight


@merge_method(
    "slerp",
    spaces=("core",),
    reference="doi:10.1145/325165.325242",
    statistics=check_pair("slerp"),
    whole_modules=True,
    most_adapters=2,
    ordered=True,
)
def slerp(
    cores: Cores,
    statistics: None,
    *,
    weight: Annotated[Tensor, PerAdapter(1.0)],
    t: Annotated[Tensor, PerAdapter(0.5), Ge(0), Le(1)],
) -> Tensor:
    """From the first adapter (t = 0) to the second (t = 1) along the arc between them. Rank ≤ Σ r_i.

    ΔW = sin((1 − t) θ) / sin θ · ΔW_1 + sin(t θ) / sin θ · ΔW_2, θ the angle between the two at the module; straight where
    |cos θ| > 0.9995. t: of the recipe, or of the second adapter. weight: multiplies an adapter's change before.
    """
    tasks = cores.scaled(weight)
    if len(tasks.slots) == 1:
        return tasks.total()
    cosine = Angles.of(tasks.gram()).cosines[:, 0, 1]
    share = t[:, 1, 0, 0]
    return tasks.scaled(slerp_coefficients(cosine, share, cosine.abs() > STRAIGHT)).total()
